"""The loss of a checkpoint on each sample of some shards, with its own condition and with that of another sample."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dico_t2i.diffusion import build
from dico_t2i.sampling.pipeline import Pipeline
from dico_t2i.training.observers.validation import band_middles
from evals.analysis.samples import chunks
from evals.real import judges

BANDS = 8


def judge_losses(pipeline: Pipeline, held_out: Path, samples: int) -> judges.Verdict:
    """The verdict on the loss of held-out samples, beside that of training samples.

    held_out: the shards that count if the config has none for validation.
    """
    trained, validation = pipeline.config.data.path, pipeline.config.validation
    assert trained is not None
    own, other = sample_losses(pipeline, Path(validation.path if validation else held_out), samples)
    return judges.loss(own, sample_losses(pipeline, Path(trained), samples)[0], other)


@torch.no_grad()
def sample_losses(pipeline: Pipeline, data: Path, samples: int, batch: int = 64) -> tuple[Tensor, Tensor]:
    """The losses (N,) of the first samples with their own conditions, and with those of the next sample in the batch.

    Noise and timesteps, the middles of equal bands, depend on the sample's number alone.
    """
    config = pipeline.config
    process = build(config.diffusion, config.model.learn_sigma)
    middles = band_middles(config.diffusion.steps, BANDS)
    losses: tuple[list[Tensor], list[Tensor]] = ([], [])
    for chunk in chunks(pipeline, str(data), samples, batch):
        t = middles[torch.arange(len(chunk.latents)) % BANDS].to(pipeline.device)
        for shift, found in enumerate(losses):
            conditioning = {name: value.roll(shift, dims=0) for name, value in chunk.conditioning.items()}
            model = partial(pipeline.model, **conditioning)
            result = process.training_losses(model, chunk.latents, t, chunk.noise)
            found.append(result["loss"].double().cpu())
    own, other = (torch.cat(found)[:samples] for found in losses)
    return own, other
