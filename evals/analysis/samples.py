"""Loads data for checkpoints as their networks take them, the same samples and noise for every checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from dico_t2i import randomness
from dico_t2i.config import Config
from dico_t2i.data.checks import check_data
from dico_t2i.data.loader import Share, make_loader
from dico_t2i.data.sources import load_data, make_order
from dico_t2i.diffusion import build
from dico_t2i.encoders import check_cached
from dico_t2i.sampling.pipeline import Pipeline


@dataclass(frozen=True)
class Chunk:
    """Clean latents and noise (N, C, h, w), and the network's conditioning, on the device."""

    latents: Tensor
    noise: Tensor
    conditioning: dict[str, Tensor]


def chunks(pipeline: Pipeline, data: str | None, samples: int, batch: int) -> Iterator[Chunk]:
    """Yield ``samples`` samples of the shards in ``data``, or of the training shards, always the same ones.

    Raises DataError or ConfigError if the shards cannot be used.
    """
    batch = min(batch, samples)
    config = _config(pipeline.config, data)
    index = load_data(config.data)
    check_data(config, index)
    encoder = pipeline.conditioner.text_encoder
    check_cached(config.data, index, pipeline.autoencoder, encoder)
    loader = make_loader(
        config.data,
        index,
        make_order(config.data, index, config.seed, batch),
        Share(batch, batch),
        pipeline.conditioner.wanted,
        seed=config.seed,
    )
    for found in islice(iter(loader), -(-samples // batch)):
        position = found.positions.to(pipeline.device)
        latents = pipeline.autoencoder.of_batch(found, position, config.seed)
        noise = randomness.normal(config.seed, "analysis noise", position, latents.shape[1:])
        yield Chunk(latents, noise, pipeline.conditioner.of_batch(found))


def _config(config: Config, data: str | None) -> Config:
    changes = {"flip": False, "workers": 0, "streams": 1, "shuffle_block": 1024}
    where = {"path": data, "mixture": (), "buckets": False} if data else {}
    changed = config.data.model_copy(update={**changes, **where})
    return config.model_copy(update={"data": changed, "seed": 0, "alignment": None})


@torch.no_grad()
def run_network(pipeline: Pipeline, chunk: Chunk, timestep: int) -> None:
    """Run the network once on the chunk, noised to this timestep as in training; hooks see the features inside."""
    config = pipeline.config
    t = torch.full((len(chunk.latents),), timestep, device=pipeline.device)
    build(config.diffusion, config.model.learn_sigma).training_losses(
        lambda x, t: pipeline.model(x, t, **chunk.conditioning), chunk.latents, t, chunk.noise
    )
