"""Which sample comes when: a pure function of (seed, position). No I/O.

An epoch permutes the shards, lays their samples end to end and cuts that sequence into equal runs, one for
each stream. A stream walks through its run in blocks, each shuffled. Position p is entry q // streams of
stream q % streams, with q = p % epoch_length. A rank owns whole streams, so it reads few shards, nearly in
sequence, and any number of ranks that divides the streams sees the same global batches.

Two more orders are made of this one: ``BucketOrder``, where every global batch has one shape, and ``MixtureOrder``
of several data sets. For both, too, the position is one integer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction
from math import ceil, gcd, lcm
from typing import Protocol, TypeVar

import numpy as np
import torch

from dico_t2i import randomness
from dico_t2i.data.errors import DataError

NEIGHBOURS = 8  # of the replacements so many are the next ones of the stream, the others lie anywhere in the epoch
MIXTURE_BLOCK = 256  # entries, at least, over which the weights of a mixture are exact
MAX_MIXTURE_BLOCK = 1 << 16

Value = TypeVar("Value")
Place = tuple[int, int]  # shard, and member in it (of a bucket: the how-manieth of it in the shard)


class SampleOrder(Protocol):
    """What the loader asks of an order."""

    seed: int
    streams: int

    @property
    def epoch_length(self) -> int:
        """Positions of an epoch."""

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard and the member in it at each position. int64 (n,) -> int64 (n,), int64 (n,)."""

    def replacement(self, position: int, attempt: int) -> Place:
        """Where to look for a sample instead of a bad one, the ``attempt``-th time (from 1)."""

    def bucket(self, position: int) -> int | None:
        """The bucket of the global batch of a position; None where there are none."""

    def sources(self, positions: np.ndarray) -> np.ndarray | None:
        """The number of the data set of each position, int64 (n,); None where there is only one."""


class Order:
    """The order of the samples of shards with ``shard_sizes`` samples each, for all epochs.

    streams: number of runs read side by side. shuffle_block: entries of a run shuffled together. name: makes the
    shuffles of several orders with one seed independent. Raises DataError if there are fewer samples than streams.
    """

    def __init__(
        self,
        seed: int,
        shard_sizes: Sequence[int] | np.ndarray,
        streams: int,
        shuffle_block: int,
        name: str = "",
    ) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        samples = int(sizes.sum())
        if samples < streams:
            raise DataError(
                f"{samples} samples in {len(sizes)} shards are fewer than {streams} streams;"
                f" use at most data.streams={samples} or more data"
            )
        self.seed, self.streams, self.shuffle_block, self.name = seed, streams, shuffle_block, name
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
        names = ((epoch * self.streams + stream) * blocks + block).tolist()
        # A micro-batch has few entries of each block: one lookup each costs less than sorting them.
        entries = [self._block(name, name % blocks)[at] for name, at in zip(names, offset.tolist(), strict=True)]
        shuffled = np.array(entries, dtype=np.int64)
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

    def replacement(self, position: int, attempt: int) -> Place:
        """Neighbours in the stream first; where they fail too the shard may be gone, so then any place of the epoch."""
        if attempt <= NEIGHBOURS:
            other = self.successor(position, attempt)
        else:
            length = self.epoch_length
            draws = randomness.words(self.seed, "replacement", torch.tensor([position]), attempt)
            other = position - position % length + int(draws[0, -1]) % length
        shard, member = self.locate(np.array([other]))
        return int(shard[0]), int(member[0])

    def bucket(self, position: int) -> int | None:
        return None

    def sources(self, positions: np.ndarray) -> np.ndarray | None:
        return None

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's permutation of the shards, and where each begins in the sequence of samples."""
        if epoch not in self._epochs:
            permuted = randomness.permutation(self.seed, "shards" + self.name, epoch, len(self._sizes))
            ends = np.cumsum(self._sizes[permuted])
            self._epochs[epoch] = permuted, ends - self._sizes[permuted]
        return _recent(self._epochs, epoch, keep=2)

    def _block(self, name: int, block: int) -> np.ndarray:
        """The shuffle of one block of one stream in one epoch; ``name`` numbers all of them."""
        if name not in self._blocks:
            size = min(self.shuffle_block, self._run - block * self.shuffle_block)
            self._blocks[name] = randomness.permutation(self.seed, "samples" + self.name, name, size).astype(np.int32)
        return _recent(self._blocks, name, keep=2 * self.streams)


class BucketOrder:
    """Global batches of one bucket each, visited in a shuffled sequence in proportion to their samples.

    counts: int (shards, buckets), the samples of each bucket in each shard. Every bucket has an ``Order`` of its own;
    an epoch holds as many whole batches of a bucket as its samples fill, and what is left over (``dropped`` samples)
    differs by epoch. A member is counted within its bucket and shard. Raises DataError if no bucket fills a batch.
    """

    def __init__(self, seed: int, counts: np.ndarray, streams: int, shuffle_block: int, global_batch: int) -> None:
        self.seed, self.streams, self.global_batch = seed, streams, global_batch
        totals = counts.sum(0, dtype=np.int64)
        self._orders = {
            bucket: Order(seed, counts[:, bucket], streams, shuffle_block, f" of bucket {bucket}")
            for bucket in np.flatnonzero(totals >= global_batch).tolist()
        }
        self.steps = {bucket: order.epoch_length // global_batch for bucket, order in self._orders.items()}
        if not self.steps:
            raise DataError(
                f"no bucket has the {global_batch} samples of a global batch, the largest {totals.max()};"
                " use fewer buckets, a smaller train.global_batch or more data"
            )
        self.dropped = int(totals.sum()) - self.epoch_length
        self.unused = int(totals[totals < global_batch].sum())  # in buckets too small for a batch
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    @property
    def epoch_length(self) -> int:
        return sum(self.steps.values()) * self.global_batch

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shard, member = np.empty_like(positions), np.empty_like(positions)
        step = positions // self.global_batch
        for s in np.unique(step).tolist():
            rows = step == s
            bucket, first = self._batch(s)
            own = first + positions[rows] - s * self.global_batch
            shard[rows], member[rows] = self._orders[bucket].locate(own)
        return shard, member

    def replacement(self, position: int, attempt: int) -> Place:
        step, offset = divmod(position, self.global_batch)
        bucket, first = self._batch(step)
        return self._orders[bucket].replacement(first + offset, attempt)

    def bucket(self, position: int) -> int | None:
        return self._batch(position // self.global_batch)[0]

    def sources(self, positions: np.ndarray) -> np.ndarray | None:
        return None

    def _batch(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and the first of the step's positions in the bucket's order."""
        epoch, within = divmod(step, sum(self.steps.values()))
        if epoch not in self._epochs:
            self._epochs[epoch] = self._sequence(epoch)
        buckets, turns = _recent(self._epochs, epoch, keep=2)
        bucket = int(buckets[within])
        return bucket, epoch * self._orders[bucket].epoch_length + int(turns[within]) * self.global_batch

    def _sequence(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The bucket of each step of an epoch, and how many steps of that bucket come before it."""
        buckets = np.repeat(list(self.steps), list(self.steps.values()))
        buckets = buckets[randomness.permutation(self.seed, "buckets", epoch, len(buckets))]
        return buckets, _turns(buckets)


class MixtureOrder:
    """Several orders as one, in proportion to weights that are exact over every block of ``block`` entries.

    starts: the first shard of each source in the numbering of the whole. Each stream shuffles which source comes
    when, block by block; a source goes through its own epochs in its own order, in the same stream. Raises DataError
    if the weights are no simple proportion.
    """

    def __init__(self, seed: int, orders: Sequence[Order], starts: Sequence[int], weights: Sequence[float]) -> None:
        self.seed, self.streams = seed, orders[0].streams
        self._orders, self._starts = tuple(orders), tuple(starts)
        self.per_block = _proportion(weights)  # entries of each source
        self.block = int(self.per_block.sum())
        self._patterns: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    @property
    def epoch_length(self) -> int:
        """Samples of all sources; in as many positions each source gets its weight, not its size."""
        return sum(order.epoch_length for order in self._orders)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shard, member = np.empty_like(positions), np.empty_like(positions)
        source, own = self._split(positions)
        for number in np.unique(source).tolist():
            rows = source == number
            shard[rows], member[rows] = self._orders[number].locate(own[rows])
            shard[rows] += self._starts[number]
        return shard, member

    def replacement(self, position: int, attempt: int) -> Place:
        source, own = (int(values[0]) for values in self._split(np.array([position])))
        shard, member = self._orders[source].replacement(own, attempt)
        return self._starts[source] + shard, member

    def bucket(self, position: int) -> int | None:
        return None

    def sources(self, positions: np.ndarray) -> np.ndarray | None:
        return self._split(positions)[0]

    def counts(self, position: int) -> np.ndarray:
        """Samples of each source at positions below ``position``, a multiple of the streams: int64 (sources,)."""
        blocks, rest = divmod(position // self.streams, self.block)
        counts = blocks * self.streams * self.per_block
        for stream in range(self.streams if rest else 0):
            pattern, _ = self._pattern(blocks * self.streams + stream)
            counts = counts + np.bincount(pattern[:rest], minlength=len(counts))
        return counts

    def _split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each position, and the position in the source's own order."""
        entry, stream = np.divmod(positions, self.streams)
        block, offset = np.divmod(entry, self.block)
        source, turn = np.empty_like(offset), np.empty_like(offset)
        name = block * self.streams + stream
        for n in np.unique(name).tolist():
            rows = name == n
            pattern, turns = self._pattern(n)
            source[rows], turn[rows] = pattern[offset[rows]], turns[offset[rows]]
        return source, (block * self.per_block[source] + turn) * self.streams + stream

    def _pattern(self, name: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each entry of one block of one stream, and how many of that source come before it."""
        if name not in self._patterns:
            sources = np.repeat(np.arange(len(self.per_block)), self.per_block)
            sources = sources[randomness.permutation(self.seed, "sources", name, self.block)]
            self._patterns[name] = sources, _turns(sources)
        return _recent(self._patterns, name, keep=2 * self.streams)


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


def _proportion(weights: Sequence[float]) -> np.ndarray:
    """Whole numbers in the proportion of the weights, as decimal fractions, that add up to a block."""
    exact = [Fraction(str(weight)) for weight in weights]
    whole = [int(value * lcm(*(v.denominator for v in exact))) for value in exact]
    whole = [value // gcd(*whole) for value in whole]
    if sum(whole) > MAX_MIXTURE_BLOCK:
        raise DataError(
            f"weights {', '.join(map(str, weights))} are exact over {sum(whole)} entries only, more than"
            f" {MAX_MIXTURE_BLOCK}; use rounder numbers"
        )
    return np.array(whole) * ceil(MIXTURE_BLOCK / sum(whole))


def _turns(values: np.ndarray) -> np.ndarray:
    """How many equal values stand before each one."""
    turns = np.empty_like(values)
    for value in np.unique(values):
        rows = values == value
        turns[rows] = np.arange(np.count_nonzero(rows))
    return turns
