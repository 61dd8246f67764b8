"""The order of the samples, as a pure function of (seed, position). There is no I/O here.

An epoch permutes the shards, concatenates their samples and cuts that sequence into equal runs, one for each
stream. A stream reads its run in blocks, each of which is shuffled. Position p is entry q // streams of
stream q % streams, with q = p % epoch_length. A rank owns whole streams, so it reads few shards, nearly in
sequence, and any number of ranks that divides the streams sees the same global batches.

Two more orders are built from this one: ``BucketOrder``, where every global batch has one shape, and ``MixtureOrder``
for several data sets. Their position is one integer, too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from math import ceil, gcd, lcm
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from dico_t2i import randomness
from dico_t2i.data.errors import DataError

NEIGHBOURS = 8  # first replacements, from the same stream; further ones come from anywhere in the epoch
MIXTURE_BLOCK = 256  # the least number of entries over which the weights of a mixture are exact
MAX_MIXTURE_BLOCK = 1 << 16
MIXED_BUCKET_BLOCK = 1 << 12  # entries over which the shares of several data sets in one bucket are rounded

_TOGETHER = 64  # permutations that are computed together; with more, only their memory would grow

Value = TypeVar("Value")
Place = tuple[int, int]  # a shard, and the index of a member in it; with buckets, among the bucket's members in it


class SampleOrder(Protocol):
    """The properties and methods of an order that the loader uses."""

    seed: int
    streams: int

    @property
    def epoch_length(self) -> int:
        """The number of positions in an epoch."""

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard and the member in it for each position: int64 (n,) -> int64 (n,), int64 (n,)."""

    def replacement(self, position: int, attempt: int) -> Place:
        """The place of the ``attempt``-th replacement (from 1) of a bad sample."""

    def bucket(self, position: int) -> int | None:
        """The bucket of the global batch of a position; None without buckets."""

    def sources(self, positions: np.ndarray) -> np.ndarray | None:
        """The index of each position's data set, int64 (n,); None if there is only one data set.

        The positions are of one global batch.
        """

    def counts(self, position: int) -> np.ndarray | None:
        """The number of samples of each data set before a global batch; None if there is only one data set."""


class _Recent(Generic[Value]):
    """A function from numbers to values that remembers the ``keep`` values used last, and makes missing ones in groups.

    make: returns the values of the numbers, int64 (n,).
    """

    def __init__(self, make: Callable[[np.ndarray], Iterable[Value]], keep: int) -> None:
        self._make, self._keep = make, keep
        self._known: OrderedDict[int, Value] = OrderedDict()

    def __call__(self, *numbers: int) -> dict[int, Value]:
        wanted, known = dict.fromkeys(numbers), self._known
        missing = [number for number in wanted if number not in known]
        for start in range(0, len(missing), _TOGETHER):
            group = missing[start : start + _TOGETHER]
            known.update(zip(group, self._make(np.array(group)), strict=True))
        for number in wanted:
            known.move_to_end(number)
        found = {number: known[number] for number in wanted}
        while len(known) > self._keep:
            known.popitem(last=False)
        return found


class Order:
    """The order of the samples of shards with ``shard_sizes`` samples each, for all epochs.

    streams: the number of runs read in parallel. shuffle_block: the entries of a run that are shuffled together. name:
    makes the shuffles of several orders with one seed independent. Raises DataError if there are fewer samples than
    streams.
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
        self._epochs = _Recent(self._make_epochs, keep=2)
        self._shuffles = _Recent(self._make_shuffles, keep=2 * streams)

    @property
    def epoch_length(self) -> int:
        """The positions in an epoch, a multiple of the streams; each epoch leaves out a few different samples."""
        return self._run * self.streams

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard and the member in it for each position: int64 (n,) -> int64 (n,), int64 (n,)."""
        epoch, within = np.divmod(positions, self.epoch_length)
        entry, stream = np.divmod(within, self.streams)
        block, offset = np.divmod(entry, self.shuffle_block)
        names = ((epoch * self.streams + stream) * self._blocks + block).tolist()
        shuffles = self._shuffles(*names)
        # A micro-batch has few entries in each block, so that single lookups cost less than sorting.
        entries = [shuffles[name][at] for name, at in zip(names, offset.tolist(), strict=True)]
        shuffled = np.array(entries, dtype=np.int64)
        sample = stream * self._run + block * self.shuffle_block + shuffled
        shard, member = np.empty_like(sample), np.empty_like(sample)
        for e, (permuted, starts) in self._epochs(*np.unique(epoch).tolist()).items():
            rows = epoch == e
            place = np.searchsorted(starts, sample[rows], side="right") - 1
            shard[rows], member[rows] = permuted[place], sample[rows] - starts[place]
        return shard, member

    def successor(self, position: int, count: int) -> int:
        """The position ``count`` entries later in the same stream; it wraps around within the epoch."""
        epoch, within = divmod(position, self.epoch_length)
        return epoch * self.epoch_length + (within + count * self.streams) % self.epoch_length

    def replacement(self, position: int, attempt: int) -> Place:
        """First the next entries of the stream; if they fail, the shard may be lost, so then any place in the epoch."""
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

    def counts(self, position: int) -> np.ndarray | None:
        return None

    def _make_epochs(self, epochs: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """Each epoch's permutation of the shards, and the start of each shard in the sequence of samples."""
        for permuted in randomness.permutations(self.seed, "shards" + self.name, epochs, len(self._sizes)):
            sizes = self._sizes[permuted]
            yield permuted, np.cumsum(sizes) - sizes

    @property
    def _blocks(self) -> int:
        """The blocks of each stream in an epoch, of which the last may have fewer entries."""
        return -(-self._run // self.shuffle_block)

    def _make_shuffles(self, names: np.ndarray) -> Iterable[np.ndarray]:
        """The shuffle of each block; a name is a number that is unique to a block, its stream and its epoch."""
        sizes = np.minimum(self.shuffle_block, self._run - names % self._blocks * self.shuffle_block)
        made: dict[int, np.ndarray] = {}
        for size in np.unique(sizes).tolist():
            group = names[sizes == size]
            shuffles = randomness.permutations(self.seed, "samples" + self.name, group, size).astype(np.int32)
            made.update(zip(group.tolist(), shuffles, strict=True))
        return [made[name] for name in names.tolist()]


class Source(NamedTuple):
    """A data set of a mixture: its name, its first shard among the shards of all, and its weight."""

    name: str
    start: int
    weight: float


class BucketOrder:
    """An order in which each global batch is from one bucket; the buckets alternate in a shuffled sequence.

    counts: int (shards, buckets), the number of samples of each bucket in each shard. Every bucket has its own
    ``Order``. An epoch has as many batches of a bucket as its samples fill completely; it leaves out the remaining
    ``dropped`` samples, different ones in each epoch. A member's index counts the samples of its bucket in its shard.
    Raises DataError if no bucket fills a batch.

    With ``sources`` every bucket has a ``MixtureOrder``, and a batch has samples of all data sets that have the bucket.
    Each data set keeps its own shares of the buckets, and all its buckets together have its weight.
    """

    def __init__(
        self,
        seed: int,
        counts: np.ndarray,
        streams: int,
        shuffle_block: int,
        global_batch: int,
        sources: Sequence[Source] = (),
    ) -> None:
        self.seed, self.streams, self.global_batch = seed, streams, global_batch
        self._orders: dict[int, Order | MixtureOrder] = {}
        self._lengths: dict[int, int] = {}  # the positions of each bucket's order in an epoch
        self._sources: dict[int, np.ndarray] = {}  # of a mixture: the numbers of the data sets in each bucket
        self._source_count = len(sources)
        totals = counts.sum(0, dtype=np.int64)
        if sources:
            self._mix(counts, shuffle_block, sources)
        else:
            for bucket in np.flatnonzero(totals >= global_batch).tolist():
                order = Order(seed, counts[:, bucket], streams, shuffle_block, f" of bucket {bucket}")
                self._orders[bucket], self._lengths[bucket] = order, order.epoch_length
        self.steps = {bucket: length // global_batch for bucket, length in self._lengths.items()}
        if not self.steps:
            raise DataError(
                f"no bucket has the {global_batch} samples of a global batch (the largest has {totals.max()});"
                " use fewer buckets, a smaller train.global_batch or more data"
            )
        self.dropped = max(0, int(totals.sum()) - self.epoch_length)
        used = np.isin(np.arange(len(totals)), list(self.steps))
        self.unused = int(totals[~used].sum())  # in buckets that are too small for a batch
        self._epochs = _Recent(self._make_epochs, keep=2)

    def _mix(self, counts: np.ndarray, shuffle_block: int, sources: Sequence[Source]) -> None:
        """Mix the data sets in each bucket, in the proportion of their weights and of their shares of the bucket."""
        parts = np.split(counts, [source.start for source in sources[1:]])
        samples = np.array([part.sum(0, dtype=np.int64) for part in parts])  # (sources, buckets)
        shares, steps = _bucket_shares(samples, [source.weight for source in sources], self.streams, self.global_batch)
        for bucket in np.flatnonzero(steps).tolist():
            own = {number: row[bucket] for number, row in enumerate(shares) if row[bucket]}
            orders = [
                Order(
                    self.seed,
                    parts[number][:, bucket],
                    self.streams,
                    shuffle_block,
                    f" of {sources[number].name} in bucket {bucket}",
                )
                for number in own
            ]
            starts, weights = [sources[number].start for number in own], _whole_parts(list(own.values()))
            self._orders[bucket] = MixtureOrder(self.seed, orders, starts, weights, f" in bucket {bucket}")
            self._lengths[bucket] = steps[bucket] * self.global_batch
            self._sources[bucket] = np.array(list(own))

    @property
    def shares(self) -> np.ndarray | None:
        """The fraction of each data set in the samples of an epoch, (sources,); None if there is only one data set."""
        if not self._sources:
            return None
        shares = np.zeros(self._source_count)
        for bucket, numbers in self._sources.items():
            order = self._orders[bucket]
            assert isinstance(order, MixtureOrder)
            shares[numbers] += self.steps[bucket] * order.per_block / order.block
        return shares / sum(self.steps.values())

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
        step = int(positions[0]) // self.global_batch
        bucket, first = self._batch(step)
        found = self._orders[bucket].sources(first + positions - step * self.global_batch)
        return None if found is None else self._sources[bucket][found]

    def counts(self, position: int) -> np.ndarray | None:
        if not self._sources:
            return None
        epoch, within = divmod(position // self.global_batch, sum(self.steps.values()))
        before = self._epochs(epoch)[epoch][0][:within]
        total = np.zeros(self._source_count, dtype=np.int64)
        for bucket, numbers in self._sources.items():
            turn = int(np.count_nonzero(before == bucket))
            own = self._orders[bucket].counts(epoch * self._lengths[bucket] + turn * self.global_batch)
            assert own is not None
            total[numbers] += own
        return total

    def _batch(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and the step's first position in the order of the bucket."""
        epoch, within = divmod(step, sum(self.steps.values()))
        buckets, turns = self._epochs(epoch)[epoch]
        bucket = int(buckets[within])
        return bucket, epoch * self._lengths[bucket] + int(turns[within]) * self.global_batch

    def _make_epochs(self, epochs: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """The bucket of each step of an epoch, and the number of earlier steps of that bucket."""
        sequence = np.repeat(np.array(list(self.steps), np.int16), list(self.steps.values()))
        for permuted in randomness.permutations(self.seed, "buckets", epochs, len(sequence)):
            yield sequence[permuted], _turns(sequence[permuted])


class MixtureOrder:
    """Several orders combined with weights that are exact over every block of ``block`` entries.

    starts: the index of each source's first shard among the shards of all sources. Each stream shuffles the sequence of
    sources in each block. Each source goes through its own epochs in its own order, in the same stream. Raises
    DataError if the weights are not in a simple proportion. name: as of ``Order``.
    """

    def __init__(
        self, seed: int, orders: Sequence[Order], starts: Sequence[int], weights: Sequence[float], name: str = ""
    ) -> None:
        self.seed, self.streams, self.name = seed, orders[0].streams, name
        self._orders, self._starts = tuple(orders), tuple(starts)
        self.per_block = _proportion(weights)  # entries of each source
        self.block = int(self.per_block.sum())
        self._patterns = _Recent(self._make_patterns, keep=2 * self.streams)

    @property
    def epoch_length(self) -> int:
        """The number of samples of all sources; in an epoch a source's share follows its weight, not its size."""
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
        """The number of samples of each source before ``position``, a multiple of the streams: int64 (sources,)."""
        blocks, rest = divmod(position // self.streams, self.block)
        counts = blocks * self.streams * self.per_block
        names = range(blocks * self.streams, (blocks + 1) * self.streams) if rest else ()
        for pattern, _ in self._patterns(*names).values():
            counts = counts + np.bincount(pattern[:rest], minlength=len(counts))
        return counts

    def _split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each position, and its position in the source's own order."""
        entry, stream = np.divmod(positions, self.streams)
        block, offset = np.divmod(entry, self.block)
        source, turn = np.empty_like(offset), np.empty_like(offset)
        name = block * self.streams + stream
        for n, (pattern, turns) in self._patterns(*np.unique(name).tolist()).items():
            rows = name == n
            source[rows], turn[rows] = pattern[offset[rows]], turns[offset[rows]]
        return source, (block * self.per_block[source] + turn) * self.streams + stream

    def _make_patterns(self, names: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """The source of each entry of a block of a stream, and the number of its earlier entries in the block."""
        sources = np.repeat(np.arange(len(self.per_block), dtype=np.int16), self.per_block)
        for permuted in randomness.permutations(self.seed, "sources" + self.name, names, self.block):
            yield sources[permuted], _turns(sources[permuted])


def rank_positions(step: int, global_batch: int, streams: int, rank: int, world: int) -> np.ndarray:
    """The positions of a step's global batch that a rank reads, in order: int64 (global_batch // world,).

    The global batch of step k has positions k * global_batch to (k + 1) * global_batch - 1. The rank reads those of its
    streams, which are rank * streams / world to (rank + 1) * streams / world - 1. Raises DataError if the ranks do not
    divide the streams, or the streams the global batch.
    """
    if global_batch % streams or streams % world or not 0 <= rank < world:
        raise DataError(
            f"rank {rank} of {world} with {streams} streams and global batch {global_batch}: the ranks must"
            " divide the streams, and the streams the global batch"
        )
    owned = streams // world
    rows = np.arange(global_batch // streams, dtype=np.int64) * streams + step * global_batch
    return (rows[:, None] + np.arange(rank * owned, (rank + 1) * owned)).ravel()


def _proportion(weights: Sequence[float]) -> np.ndarray:
    """Integers in the exact proportion of the weights as decimal fractions, which add up to a block."""
    exact = [Fraction(str(weight)) for weight in weights]
    whole = [int(value * lcm(*(v.denominator for v in exact))) for value in exact]
    whole = [value // gcd(*whole) for value in whole]
    if sum(whole) > MAX_MIXTURE_BLOCK:
        raise DataError(
            f"weights {', '.join(map(str, weights))} are exact only over {sum(whole)} entries, more than"
            f" {MAX_MIXTURE_BLOCK}; use rounder numbers"
        )
    return np.array(whole) * ceil(MIXTURE_BLOCK / sum(whole))


def _bucket_shares(
    samples: np.ndarray, weights: Sequence[float], streams: int, global_batch: int
) -> tuple[list[list[Fraction]], list[int]]:
    """Each source's share of each bucket in the samples of an epoch, and the number of batches of each bucket.

    samples: int64 (sources, buckets). The shares of a source add up to its weight and are in the proportion of its
    samples. A source has no share of a bucket of which it has fewer samples than there are streams, and no source has a
    share of a bucket that does not fill a batch. Raises DataError if nothing of a source is left.
    """
    usable, exact = samples >= streams, [Fraction(str(weight)) for weight in weights]
    while True:
        own = np.where(usable, samples, 0)
        sums = own.sum(1).tolist()
        if not all(sums):
            raise DataError(
                f"data set {sums.index(0)} of the mixture (counted from 0): no bucket has both {streams} of its"
                f" samples, one for each stream, and a batch of {global_batch}; use fewer buckets, or leave it out"
            )
        shares = [
            [weight / sum(exact) * count / total for count in row]
            for weight, row, total in zip(exact, own.tolist(), sums, strict=True)
        ]
        steps = [int(sum(column) * sum(sums) // global_batch) for column in zip(*shares, strict=True)]
        empty = (np.array(steps) == 0) & usable.any(0)
        if not empty.any():
            return shares, steps
        usable[:, empty] = False


def _whole_parts(shares: Sequence[Fraction]) -> list[int]:
    """Whole numbers, at least 1 each, in the proportion of the shares: MIXED_BUCKET_BLOCK in all."""
    exact = [share / sum(shares) * MIXED_BUCKET_BLOCK for share in shares]
    parts = [max(1, int(value)) for value in exact]
    while missing := MIXED_BUCKET_BLOCK - sum(parts):
        change = 1 if missing > 0 else -1
        gaps = [change * (value - part) for value, part in zip(exact, parts, strict=True)]
        parts[gaps.index(max(gaps))] += change
    return parts


def _turns(values: np.ndarray) -> np.ndarray:
    """For each value, the number of equal values before it: int32."""
    turns = np.empty(len(values), np.int32)
    for value in np.unique(values):
        rows = values == value
        turns[rows] = np.arange(np.count_nonzero(rows))
    return turns
