"""Makes the loader of a rank's micro-batches, with data workers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

from dico_t2i.config import DataConfig
from dico_t2i.data.batches import Batch, MicroBatches, Samples, Wanted, pixel_shapes, wanted_extensions
from dico_t2i.data.errors import DataError
from dico_t2i.data.index import DatasetIndex
from dico_t2i.data.order import SampleOrder, rank_positions
from dico_t2i.data.reader import ShardReader
from dico_t2i.data.workers import POLL_S, SupervisedLoader, set_up_worker

PREFETCH = 4  # micro-batches per worker


_MAX_OPEN_SHARDS = 256


class Share(NamedTuple):
    """A rank's share of each step: its positions of the global batch, cut into micro-batches."""

    global_batch: int
    micro_batch: int
    rank: int = 0
    world: int = 1


def make_loader(
    data: DataConfig,
    index: DatasetIndex,
    order: SampleOrder,
    share: Share,
    wanted: Wanted,
    *,
    seed: int,
    start_step: int = 0,
    first_position: int = 0,
    timeout_s: float = 0.0,
) -> Iterable[Batch]:
    """Endless micro-batches of a rank: for each step from ``start_step``, its positions in order, cut into equal parts.

    first_position: the samples of the run before the first one of this order, as after a stage; random draws and the
    positions in batches count them, too. timeout_s: the longest wait for a worker's micro-batch; 0 means no limit.
    Raises DataError if the sizes do not divide, or if the latents in the index do not fit the config. The iteration
    raises DataError, with the worker's name, if a worker has died or is late.
    """
    positions_of = partial(
        rank_positions,
        global_batch=share.global_batch,
        streams=order.streams,
        rank=share.rank,
        world=share.world,
    )
    per_rank = len(positions_of(start_step))
    if per_rank % share.micro_batch:
        raise DataError(f"micro-batch {share.micro_batch} does not divide the {per_rank} samples of a rank and step")
    # A block of a stream spans a few shards; those of all streams should stay open.
    open_shards = min(_MAX_OPEN_SHARDS, 4 * order.streams // share.world)
    extensions = wanted_extensions(data, index, wanted.condition)
    reader = ShardReader(
        index, open_shards, data.retries, data.retry_wait_s, extensions=extensions, obey_quarantine=True
    )
    samples = Samples(data, reader, order, seed, wanted, pixel_shapes(data, index), first_position)
    plan = MicroBatches(samples, positions_of, share.micro_batch, per_rank // share.micro_batch, start_step)
    if not data.workers:
        return DataLoader(plan, batch_size=None, pin_memory=torch.cuda.is_available())
    loader = DataLoader(
        plan,
        batch_size=None,
        num_workers=data.workers,
        multiprocessing_context="fork",
        prefetch_factor=PREFETCH,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(set_up_worker, os.getpid()),
        timeout=POLL_S,
    )
    return SupervisedLoader(loader, plan, share.rank, timeout_s)
