import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dico_t2i.data.errors import DataError
from dico_t2i.data.order import Order, rank_positions


def pairs(order, positions):
    shard, member = order.locate(np.asarray(positions, dtype=np.int64))
    return list(zip(shard.tolist(), member.tolist(), strict=True))


orders = st.builds(
    Order,
    seed=st.integers(0, 2**40),
    shard_sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12).map(lambda sizes: [16, *sizes]),
    streams=st.sampled_from([1, 2, 4, 8, 16]),
    shuffle_block=st.integers(1, 40),
)


@settings(max_examples=40, deadline=None)
@given(order=orders, epoch=st.integers(0, 3))
def test_each_sample_comes_at_most_once_an_epoch(order, epoch):
    sizes = order._sizes
    found = pairs(order, epoch * order.epoch_length + np.arange(order.epoch_length))
    assert len(set(found)) == len(found) == sizes.sum() // order.streams * order.streams
    assert all(0 <= member < sizes[shard] for shard, member in found)


@settings(max_examples=25, deadline=None)
@given(order=orders, start=st.integers(0, 500))
def test_positions_are_located_independently(order, start):
    together = pairs(order, np.arange(start, start + 40))
    assert together == [pairs(order, [position])[0] for position in range(start, start + 40)]
    fresh = Order(order.seed, order._sizes, order.streams, order.shuffle_block)
    assert pairs(fresh, np.arange(start + 39, start - 1, -1)) == together[::-1]


@settings(max_examples=25, deadline=None)
@given(
    step=st.integers(0, 10**12),
    streams=st.sampled_from([4, 8, 12]),
    per_stream=st.integers(1, 5),
    world=st.sampled_from([1, 2, 4]),
)
def test_ranks_share_the_global_batch_by_streams(step, streams, per_stream, world):
    batch = streams * per_stream
    parts = [rank_positions(step, batch, streams, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(step * batch, (step + 1) * batch))
    for rank, part in enumerate(parts):
        assert (np.diff(part) > 0).all()
        assert set((part % streams).tolist()) == set(range(rank * streams // world, (rank + 1) * streams // world))


def test_epochs_seeds_and_leftovers_differ():
    sizes = [10] * 10 + [3]
    order = Order(0, sizes, 8, 16)
    epochs = [pairs(order, e * order.epoch_length + np.arange(order.epoch_length)) for e in range(4)]
    assert order.epoch_length == 96
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({frozenset(epoch) for epoch in epochs}) > 1  # not always the same 96 of 103
    assert pairs(Order(1, sizes, 8, 16), np.arange(96)) != epochs[0]
    single = Order(0, [64], 8, 8)
    assert len({tuple(pairs(single, e * 64 + np.arange(64))) for e in range(4)}) == 4


def test_a_stream_stays_within_its_run_and_blocks():
    order = Order(0, [100] * 8, streams=4, shuffle_block=50)
    for stream in range(4):
        found = pairs(order, np.arange(stream, order.epoch_length, 4))
        blocks = [found[i : i + 50] for i in range(0, 200, 50)]
        assert [len({shard for shard, _ in block}) for block in blocks] == [1, 1, 1, 1]
        assert sorted(member for _, member in blocks[0] + blocks[1]) == list(range(100))
        assert all(block != sorted(block) for block in blocks)


def test_first_places_are_uniform():
    first = [pairs(Order(seed, [8, 8], 1, 16), [0])[0] for seed in range(800)]
    counts = np.unique([shard * 8 + member for shard, member in first], return_counts=True)[1]
    # Chi-square with 15 degrees of freedom: 37.7 is exceeded once in a thousand.
    assert ((counts - 50) ** 2 / 50).sum() < 37.7


@settings(max_examples=25, deadline=None)
@given(order=orders, position=st.integers(0, 300), count=st.integers(1, 300))
def test_successors_stay_in_stream_and_epoch(order, position, count):
    successor = order.successor(position, count)
    assert successor % order.streams == position % order.streams
    assert successor // order.epoch_length == position // order.epoch_length
    assert order.successor(position, order.epoch_length // order.streams) == position


def test_a_billion_samples_take_little_memory():
    sizes = np.full(100_000, 10_000)
    tracemalloc.start()
    order = Order(0, sizes, streams=64, shuffle_block=1024)
    for step in (0, 1, 10**6, 10**7):
        order.locate(np.arange(step * 256, (step + 1) * 256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20
    late = order.epoch_length * 3 - 512 + np.arange(1024)
    assert len(set(pairs(order, late))) == 1024


def test_too_few_samples_are_refused_with_the_numbers():
    with pytest.raises(DataError, match="7 samples in 2 shards are fewer than 8 streams"):
        Order(0, [3, 4], 8, 16)


@pytest.mark.parametrize(("batch", "streams", "rank", "world"), [(10, 4, 0, 1), (8, 4, 0, 3), (8, 4, 2, 2)])
def test_uneven_splits_are_refused(batch, streams, rank, world):
    with pytest.raises(DataError, match="must divide"):
        rank_positions(0, batch, streams, rank, world)
