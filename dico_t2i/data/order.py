"""Which sample comes when: a pure function of (seed, position). No I/O.

An epoch permutes the shards, lays their samples end to end and cuts that sequence into equal runs, one for
each stream. A stream walks through its run in blocks, each shuffled. Position p is entry q // streams of
stream q % streams, with q = p % epoch_length. A rank owns whole streams, so it reads few shards, nearly in
sequence, and any number of ranks that divides the streams sees the same global batches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from dico_t2i import randomness
from dico_t2i.data.index import DataError

Value = TypeVar("Value")


class Order:
    """The order of the samples of shards with ``shard_sizes`` samples each, for all epochs.

    streams: number of runs read side by side. shuffle_block: entries of a run shuffled together.
    Raises DataError if there are fewer samples than streams.
    """

    def __init__(self, seed: int, shard_sizes: Sequence[int] | np.ndarray, streams: int, shuffle_block: int) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        samples = int(sizes.sum())
        if samples < streams:
            raise DataError(
                f"{samples} samples in {len(sizes)} shards are fewer than {streams} streams;"
                f" use at most data.streams={samples} or more data"
            )
        self.seed, self.streams, self.shuffle_block = seed, streams, shuffle_block
        self._sizes = sizes
        self._run = samples // streams
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._blocks: OrderedDict[int, np.ndarray] = OrderedDict()

    @property
    def epoch_length(self) -> int:
        """Positions of an epoch, a multiple of the streams; the few samples left over differ by epoch."""
        return self._run * self.streams

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard and the member in it at each position. int64 (n,) -> int64 (n,), int64 (n,)."""
        epoch, within = np.divmod(positions, self.epoch_length)
        entry, stream = np.divmod(within, self.streams)
        block, offset = np.divmod(entry, self.shuffle_block)
        blocks = -(-self._run // self.shuffle_block)
        names, inverse = np.unique((epoch * self.streams + stream) * blocks + block, return_inverse=True)
        shuffled = np.empty_like(offset)
        # A batch touches each stream's block a few times: one lookup per block, not per sample.
        by_block = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse))[:-1])
        for name, rows in zip(names.tolist(), by_block, strict=True):
            shuffled[rows] = self._block(name, name % blocks)[offset[rows]]
        sample = stream * self._run + block * self.shuffle_block + shuffled
        shard, member = np.empty_like(sample), np.empty_like(sample)
        for e in np.unique(epoch).tolist():
            rows = epoch == e
            permuted, starts = self._epoch(e)
            place = np.searchsorted(starts, sample[rows], side="right") - 1
            shard[rows], member[rows] = permuted[place], sample[rows] - starts[place]
        return shard, member

    def successor(self, position: int, count: int) -> int:
        """The position ``count`` entries on in the same stream, wrapping within the epoch."""
        epoch, within = divmod(position, self.epoch_length)
        return epoch * self.epoch_length + (within + count * self.streams) % self.epoch_length

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's permutation of the shards, and where each begins in the sequence of samples."""
        if epoch not in self._epochs:
            permuted = randomness.permutation(self.seed, "shards", epoch, len(self._sizes))
            ends = np.cumsum(self._sizes[permuted])
            self._epochs[epoch] = permuted, ends - self._sizes[permuted]
        return _recent(self._epochs, epoch, keep=2)

    def _block(self, name: int, block: int) -> np.ndarray:
        """The shuffle of one block of one stream in one epoch; ``name`` numbers all of them."""
        if name not in self._blocks:
            size = min(self.shuffle_block, self._run - block * self.shuffle_block)
            self._blocks[name] = randomness.permutation(self.seed, "samples", name, size).astype(np.int32)
        return _recent(self._blocks, name, keep=2 * self.streams)


def rank_positions(step: int, global_batch: int, streams: int, rank: int, world: int) -> np.ndarray:
    """The positions of a step's global batch that a rank takes, in order: int64 (global_batch // world,).

    The global batch of step k is [k * global_batch, (k + 1) * global_batch). The rank takes the positions of
    its streams, [rank * streams / world, (rank + 1) * streams / world). Raises DataError if that is uneven.
    """
    if global_batch % streams or streams % world or not 0 <= rank < world:
        raise DataError(
            f"rank {rank} of {world} with {streams} streams and global batch {global_batch}: the ranks must"
            " divide the streams, and the streams the global batch"
        )
    owned = streams // world
    rows = np.arange(global_batch // streams, dtype=np.int64) * streams + step * global_batch
    return (rows[:, None] + np.arange(rank * owned, (rank + 1) * owned)).ravel()


def _recent(cache: OrderedDict[int, Value], key: int, keep: int) -> Value:
    """The value of ``key``, now the newest of the ``keep`` that stay."""
    cache.move_to_end(key)
    while len(cache) > keep:
        cache.popitem(last=False)
    return cache[key]
