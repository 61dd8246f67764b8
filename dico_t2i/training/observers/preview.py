"""Samples grids of images during training."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from dico_t2i.config import Config
from dico_t2i.encoders import Autoencoder
from dico_t2i.encoders.conditioner import Conditioner
from dico_t2i.models import Network
from dico_t2i.runs.folder import RunFolder
from dico_t2i.sampling.images import make_grid
from dico_t2i.sampling.pipeline import Pipeline
from dico_t2i.training.observers.reporter import Reporter
from dico_t2i.training.ranks.distributed import World


def sample_preview(
    config: Config,
    model: Network,
    encoders: tuple[Autoencoder, Conditioner],
    world: World,
    run: RunFolder,
    report: Reporter,
    step: int,
) -> None:
    """Sample the config's prompts or labels, divided among the ranks; collective."""
    conditions: Sequence[str | int] = config.preview.prompts or config.preview.labels
    pipeline = Pipeline(config, model, *encoders, world.device)
    share = -(-len(conditions) // world.size)
    padded = [conditions[i % len(conditions)] for i in range(share * world.size)]
    mine = slice(world.rank * share, (world.rank + 1) * share)
    images = pipeline.generate(padded[mine], list(range(len(padded)))[mine], config.preview.sampler).to(world.device)
    gathered = [torch.empty_like(images) for _ in range(world.size)]
    dist.all_gather(gathered, images)
    if world.is_main:
        path = run.samples / f"step-{step:08d}.png"
        grid = make_grid(torch.cat(gathered).cpu()[: len(conditions)], [str(c) for c in conditions])
        try:
            run.samples.mkdir(exist_ok=True)
            grid.save(path)
            report.image(step, path)
        except OSError as error:  # a full disk must not end the run
            report.event(step, "samples failed", f"{path} could not be written: {error}")
