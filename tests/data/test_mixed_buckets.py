"""Mixtures of data sets, some of them at URLs, whose batches have the shapes of buckets."""

import threading
from collections import Counter
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_buckets import SHAPES, encoded
from test_cache import Server
from test_loader import tokenize

from dico_t2i.config import DataConfig
from dico_t2i.data.batches import Wanted
from dico_t2i.data.buckets import assign_buckets
from dico_t2i.data.errors import DataError
from dico_t2i.data.index import load_index
from dico_t2i.data.loader import Share, make_loader
from dico_t2i.data.order import MIXED_BUCKET_BLOCK, BucketOrder, MixtureOrder, Source
from dico_t2i.data.sources import load_data, make_order
from dico_t2i.data.writer import ShardWriter

BATCH, STREAMS = 8, 4
WIDE, TALL, SQUARE, LONG = (90, 60), (60, 90), (64, 64), (200, 100)  # width, height
IMAGES = {"a": [WIDE] * 60 + [TALL] * 30, "b": [TALL] * 20 + [SQUARE] * 40 + [LONG] * 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    for name, sizes in IMAGES.items():
        with ShardWriter(root / name, 11) as writer:
            for number, size in enumerate(np.random.default_rng(0).permutation(np.array(sizes)).tolist()):
                key = f"{name}{size[0]:03d}x{size[1]:03d}-{number:03d}"
                writer.write({"__key__": key, "png": encoded(*size), "json": {"captions": [f"{number}:0"]}})
        assign_buckets(root / name, SHAPES)
    return root


@pytest.fixture(scope="module")
def data(folders, tmp_path_factory):
    """One of the two is read from a web server, through the cache."""
    server = Server(folders)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sources = [
        {"path": str(folders / "a"), "name": "a", "weight": 3},
        {"path": f"{server.url}/b", "name": "b", "weight": 1},
    ]
    cache = {"path": str(tmp_path_factory.mktemp("cache")), "max_gb": 1}
    changes = {"buckets": True, "image_size": 64, "streams": STREAMS, "shuffle_block": 5, "workers": 0, "flip": False}
    yield DataConfig(mixture=sources, cache=cache, **changes)
    server.shutdown()
    server.server_close()


def steps(data, count, world=1, micro_batch=2, start_step=0):
    """Position -> (key, shape, source) of some steps, of all ranks."""
    index, found = load_data(data), {}
    order = make_order(data, index, 3, BATCH)
    for rank in range(world):
        wanted, share = Wanted("text", tokenize=tokenize), Share(BATCH, micro_batch, rank, world)
        batches = make_loader(data, index, order, share, wanted, seed=3, start_step=start_step)
        for batch in islice(batches, count * BATCH // world // micro_batch):
            rows = zip(batch.positions.tolist(), batch.keys, batch.images, batch.sources.tolist(), strict=True)
            found |= {position: (key, tuple(image.shape), source) for position, key, image, source in rows}
    return found


def test_a_batch_has_one_shape_and_samples_of_all_that_have_it(data):
    found = steps(data, 60)
    seen = Counter()
    for step in range(60):
        rows = [found[step * BATCH + i] for i in range(BATCH)]
        assert len({shape for _, shape, _ in rows}) == 1
        assert all("ab"[source] == key[0] for key, _, source in rows)
        seen[frozenset(key[1:8] for key, *_ in rows)] += 1
    both = [rows for rows in seen if rows == {"060x090"}]
    assert both, "no tall batch"
    tall = [key[0] for key, *_ in found.values() if key[1:8] == "060x090"]
    assert set(tall) == {"a", "b"}
    assert not any(key[1:8] == "200x100" for key, *_ in found.values())  # too few for the streams


@pytest.mark.parametrize(("world", "micro_batch", "start"), [(2, 2, 0), (4, 1, 3), (1, 4, 7)])
def test_any_world_size_and_start_gives_the_same_batches(data, world, micro_batch, start):
    found = steps(data, 14 - start, world, micro_batch, start_step=start)
    assert found == {p: row for p, row in steps(data, 14).items() if p >= start * BATCH}


def test_weights_hold_over_all_buckets_and_each_source_keeps_its_own_buckets(data):
    order = make_order(data, load_data(data), 3, BATCH)
    assert isinstance(order, BucketOrder)
    assert order.shares == pytest.approx([0.75, 0.25], abs=0.05)  # whole batches of three buckets
    found = steps(data, 200)
    counts = Counter((key[0], key[1:8]) for key, *_ in found.values())
    a, b = (sum(count for (name, _), count in counts.items() if name == wanted) for wanted in "ab")
    assert order.counts(200 * BATCH).tolist() == [a, b]
    assert [a / (a + b), b / (a + b)] == pytest.approx(order.shares.tolist(), abs=0.02)
    assert counts["a", "090x060"] / a == pytest.approx(2 / 3, abs=0.06)
    assert counts["b", "064x064"] / b == pytest.approx(2 / 3, abs=0.06)
    repeats = Counter(key for key, *_ in found.values() if key.startswith("a090"))
    assert max(repeats.values()) - min(repeats.values()) <= 2  # epochs of its own


def test_other_buckets_are_refused(folders, tmp_path, data):
    with ShardWriter(tmp_path / "c", 11) as writer:
        for number in range(20):
            writer.write({"__key__": f"{number}", "png": encoded(64, 64), "json": {"captions": ["x"]}})
    sources = [data.mixture[0], {"path": str(tmp_path / "c"), "name": "c"}]
    mixed = DataConfig(mixture=sources, buckets=True, image_size=64)
    load_index(tmp_path / "c")
    with pytest.raises(DataError, match="a and c cannot be mixed: buckets is"):
        load_data(mixed)


class TestOrder:
    """The order alone, on random counts."""

    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 2**40), weights=st.lists(st.sampled_from([1, 2, 0.1, 7]), min_size=2, max_size=3))
    def test_positions_are_a_function_and_places_exist(self, seed, weights):
        random = np.random.default_rng(seed)
        counts = random.integers(0, 60, (3 * len(weights), 3))
        counts[::3] += 20
        sources = [Source("abc"[number], 3 * number, weight) for number, weight in enumerate(weights)]
        order = BucketOrder(seed, counts, 4, 7, 8, sources)
        total = order.epoch_length
        assert abs(order.shares - np.array(weights) / sum(weights)).max() < 8 * 3 / total + 3 / MIXED_BUCKET_BLOCK
        step = int(random.integers(0, 3 * total // 8))
        positions = step * 8 + np.arange(8)
        bucket = order.bucket(step * 8)
        shard, member = order.locate(positions)
        assert all(m < counts[s, bucket] for s, m in zip(shard.tolist(), member.tolist(), strict=True))
        assert (shard // 3 == order.sources(positions)).all()
        assert np.array_equal(order.sources(positions[3:5]), order.sources(positions)[3:5])
        fresh = BucketOrder(seed, counts, 4, 7, 8, sources)
        assert np.array_equal(fresh.locate(positions[2:3])[0], shard[2:3])
        assert int(fresh.locate(positions[2:3])[1][0]) == int(member[2])
        before = np.sum(
            [np.bincount(order.sources(s * 8 + np.arange(8)), minlength=len(weights)) for s in range(step)], 0
        )
        assert order.counts(step * 8).tolist() == np.broadcast_to(before, len(weights)).tolist()

    def test_a_source_without_a_full_bucket_is_told(self):
        counts = np.array([[40, 0], [3, 3]])
        with pytest.raises(DataError, match="data set 1 of the mixture"):
            BucketOrder(0, counts, 4, 8, 8, [Source("a", 0, 1), Source("b", 1, 1)])

    def test_one_source_has_the_same_batches_as_without_a_mixture(self):
        counts = np.array([[40, 24], [24, 8]])
        mixed = BucketOrder(0, counts, 4, 8, 8, [Source("a", 0, 1)])
        assert mixed.steps == BucketOrder(0, counts, 4, 8, 8).steps
        assert mixed.shares.tolist() == [1.0]
        assert all(isinstance(order, MixtureOrder) for order in mixed._orders.values())


def test_parts_are_whole_and_near():
    from dico_t2i.data.order import _whole_parts

    for shares in ([Fraction(1, 3)] * 3, [Fraction(1, 10**9), Fraction(1)], [Fraction(2, 7), Fraction(5, 7)]):
        parts = _whole_parts(shares)
        assert sum(parts) == MIXED_BUCKET_BLOCK
        exact = [share / sum(shares) * MIXED_BUCKET_BLOCK for share in shares]
        assert all(abs(part - value) <= 1 for part, value in zip(parts, exact, strict=True))
