import io
import sys
from itertools import islice
from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_loader import tokenize

from dico_t2i.config import ConfigError, DataConfig, parse_config
from dico_t2i.data import __main__ as command
from dico_t2i.data.batches import Wanted
from dico_t2i.data.buckets import assign_buckets, bucket_shapes, nearest_bucket
from dico_t2i.data.checks import check_data
from dico_t2i.data.decode import decode_image
from dico_t2i.data.errors import DataError
from dico_t2i.data.index import load_index
from dico_t2i.data.loader import Share, make_loader
from dico_t2i.data.order import BucketOrder
from dico_t2i.data.sources import make_order
from dico_t2i.data.writer import ShardFile, ShardWriter

BATCH, STREAMS = 8, 4


def encoded(width, height, colour=(200, 30, 30), form="PNG", **options):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("base", [32, 64, 128, 256, 512, 1024])
def test_shapes_fill_the_budget_within_the_ratio(base):
    shapes = bucket_shapes(base)
    assert (base, base) in shapes
    assert len(set(shapes)) == len(shapes)
    for height, width in shapes:
        assert (width, height) in shapes
        assert height % 32 == width % 32 == 0
        assert height * width <= base * base < max(height, width) * (min(height, width) + 32)
        assert 0.5 <= height / width <= 2
    assert shapes == sorted(shapes, key=lambda shape: shape[1] / shape[0])
    if base == 256:
        assert shapes == [(320, 192), (288, 224), (256, 256), (224, 288), (192, 320)]


def test_a_base_that_is_no_multiple_is_refused():
    with pytest.raises(DataError, match="multiple of 32"):
        bucket_shapes(100)


@given(height=st.integers(1, 5000), width=st.integers(1, 5000))
def test_the_nearest_bucket_is_the_nearest_by_proportion(height, width):
    shapes = bucket_shapes(256)
    distances = [abs(log(w / h) - log(width / height)) for h, w in shapes]
    assert distances[nearest_bucket(height, width, shapes)] == min(distances)


def test_a_crop_covers_the_bucket_and_keeps_the_middle():
    image = Image.new("RGB", (400, 100), (255, 0, 0))
    image.paste((0, 255, 0), (100, 0, 300, 100))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    decoded = decode_image(buffer.getvalue(), (32, 64), "center")
    assert decoded.shape == (3, 32, 64)
    assert (decoded[1].int() == 255).all()  # exactly the middle 200 x 100
    squeezed = decode_image(buffer.getvalue(), (64, 32), "resize")
    assert squeezed.shape == (3, 64, 32)
    assert (squeezed[0, :, 0] > 250).all()


SIZES = [(90, 60)] * 37 + [(60, 90)] * 23 + [(64, 64)] * 29 + [(200, 100)] * 5  # width, height


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    root = tmp_path_factory.mktemp("bucketed")
    numbers = np.random.default_rng(0).permutation(len(SIZES)).tolist()
    with ShardWriter(root, samples_per_shard=11) as writer:
        for i in numbers:
            width, height = SIZES[i]
            writer.write({"__key__": f"{i:04d}", "png": encoded(width, height), "json": {"captions": [f"{i}:0"]}})
    return assign_buckets(root, SHAPES)


SHAPES = [(96, 64), (64, 64), (64, 96), (32, 64)]


def expected_bucket(key):
    width, height = SIZES[int(key)]
    return {(90, 60): 2, (60, 90): 0, (64, 64): 1, (200, 100): 3}[width, height]


def loader(index, world=1, rank=0, start_step=0, micro_batch=2, workers=0):
    config = DataConfig(path=str(index.root), buckets=True, streams=STREAMS, shuffle_block=5, workers=workers)
    order = make_order(config, index, 3, BATCH)
    return make_loader(
        config,
        index,
        order,
        Share(BATCH, micro_batch, rank, world),
        Wanted("text", tokenize=tokenize),
        seed=3,
        start_step=start_step,
    )


def steps(index, count, world=1, micro_batch=2, **options):
    """Of each position its key and picture, over all ranks."""
    found = {}
    for rank in range(world):
        for batch in islice(
            loader(index, world, rank, micro_batch=micro_batch, **options), count * BATCH // world // micro_batch
        ):
            for position, key, image in zip(batch.positions.tolist(), batch.keys, batch.images, strict=True):
                assert position not in found
                found[position] = key, tuple(image.shape), image.sum().item()
    return found


def test_the_index_holds_the_bucket_of_each_image(index):
    assert index.meta["buckets"] == [list(shape) for shape in SHAPES]
    assert index.bucket_counts.sum(0).tolist() == [23, 29, 37, 5]
    for shard in range(len(index.names)):
        table = index.shard(shard)
        assert table.bucket.dtype == np.int16
        assert table.bucket.tolist() == [expected_bucket(table.key(row)) for row in range(len(table))]


def test_a_global_batch_has_one_shape_and_an_epoch_each_sample_at_most_once(index):
    order = make_order(DataConfig(path="x", buckets=True, streams=STREAMS, shuffle_block=5), index, 3, BATCH)
    assert order.steps == {0: 2, 1: 3, 2: 4}
    assert (order.epoch_length, order.unused, order.dropped) == (72, 5, 94 - 72)
    found = steps(index, 18)
    epochs = []
    for epoch in range(2):
        rows = [found[epoch * 72 + i] for i in range(72)]
        keys = [key for key, *_ in rows]
        assert len(set(keys)) == 72
        visited = []
        for step in range(9):
            buckets = {expected_bucket(key) for key in keys[step * 8 : step * 8 + 8]}
            shapes = {shape for _, shape, _ in rows[step * 8 : step * 8 + 8]}
            assert len(buckets) == 1
            assert shapes == {(3, *SHAPES[next(iter(buckets))])}
            visited += buckets
        assert sorted(visited) == [0] * 2 + [1] * 3 + [2] * 4
        epochs.append((visited, frozenset(keys)))
    assert epochs[0][0] != epochs[1][0]
    assert epochs[0][1] != epochs[1][1]  # others are dropped


@pytest.mark.parametrize(("world", "micro_batch", "start"), [(2, 2, 0), (4, 1, 0), (1, 4, 7), (2, 4, 11)])
def test_any_world_size_and_start_gives_the_same_batches(index, world, micro_batch, start):
    found = steps(index, 14 - start, world, micro_batch, start_step=start)
    assert found == {p: row for p, row in steps(index, 14).items() if p >= start * BATCH}


def test_workers_give_the_same_batches(index):
    assert steps(index, 10, workers=2) == steps(index, 10)


def test_a_bad_sample_is_replaced_from_its_bucket(tmp_path):
    with ShardWriter(tmp_path, 11) as writer:
        for i in range(60):
            data = encoded(*((90, 60) if i % 2 else (60, 90)))
            data = {7: data[:-30], 8: b"no image"}.get(i, data)  # of the first the header is whole
            writer.write({"__key__": f"{i:04d}", "png": data, "json": {"captions": [f"{i}:0"]}})
    broken = assign_buckets(tmp_path, SHAPES[:3])
    assert broken.bucket_counts.sum(0).tolist() == [29, 1, 30]  # the square for the one without a size
    batches = list(islice(loader(broken), 4 * 12))  # epochs of 48 samples
    assert {entry.key for batch in batches for entry in batch.bad} == {"0007"}
    for batch in batches:
        assert len({int(key) % 2 for key in batch.keys}) == 1


class TestOrder:
    """The order alone, on random counts."""

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 2**40), shards=st.integers(1, 9), buckets=st.integers(1, 5), data=st.data())
    def test_positions_are_a_function_and_epochs_repeat_nothing(self, seed, shards, buckets, data):
        counts = np.random.default_rng(seed).integers(0, 30, (shards, buckets))
        counts[0, 0] += 16
        order = BucketOrder(seed, counts, 4, 7, 8)
        epoch = data.draw(st.integers(0, 2))
        positions = epoch * order.epoch_length + np.arange(order.epoch_length)
        shard, member = order.locate(positions)
        bucket = np.array([order.bucket(p) for p in positions.tolist()])
        assert (bucket.reshape(-1, 8) == bucket.reshape(-1, 8)[:, :1]).all()
        places = list(zip(bucket.tolist(), shard.tolist(), member.tolist(), strict=True))
        assert len(set(places)) == len(places)
        assert all(m < counts[s, b] for b, s, m in places)
        some = data.draw(st.integers(0, order.epoch_length - 1))
        fresh = BucketOrder(seed, counts, 4, 7, 8)
        assert [int(v[0]) for v in fresh.locate(positions[some : some + 1])] == [*places[some][1:]]

    def test_too_few_for_any_batch_is_told(self):
        with pytest.raises(DataError, match="no bucket has the 8 samples"):
            BucketOrder(0, np.array([[3, 4], [4, 3]]), 4, 8, 8)


def test_latents_come_in_the_shape_of_their_bucket(tmp_path):
    meta = {"latent_channels": 2, "latent_size": 8, "image_size": 64, "crop": "center", "mirrored": False}
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path, 16, "latents", {**meta, "buckets": [[64, 64], [32, 96]]}) as writer:
        for i in range(40):
            shape = (4, 8, 8) if i % 3 else (4, 4, 12)
            moments = rng.normal(size=shape).astype(np.float16)
            writer.write({"__key__": f"{i}", "moments.npy": moments, "cls": i, "__bucket__": int(i % 3 == 0)})
    index = load_index(tmp_path)
    assert index.bucket_counts.sum(0).tolist() == [26, 14]
    config = DataConfig(path=str(tmp_path), buckets=True, image_size=64, streams=2, workers=0)
    batches = make_loader(config, index, make_order(config, index, 0, 4), Share(4, 2), Wanted("class"), seed=0)
    shapes = set()
    for batch in islice(batches, 2 * (26 // 4 + 14 // 4)):
        assert not batch.bad
        assert {int(key) % 3 == 0 for key in batch.keys} == {batch.moments.shape[1:] == (4, 4, 12)}
        shapes.add(tuple(batch.moments.shape))
    assert shapes == {(2, 4, 8, 8), (2, 4, 4, 12)}


def test_buckets_survive_indexing_anew_and_the_command_assigns_them(tmp_path, monkeypatch, capsys):
    with ShardWriter(tmp_path, 4) as writer:
        for i in range(6):
            exif = Image.Exif()
            exif[0x0112] = 6 if i == 5 else 1  # shown upright
            writer.write({"__key__": f"{i}", "jpg": encoded(640, 320, form="JPEG", exif=exif), "txt": "a"})
    monkeypatch.setattr(sys, "argv", ["data", str(tmp_path), "--buckets", "256"])
    command.main()
    assert "192 x 320: 5" in capsys.readouterr().out
    index = load_index(tmp_path)
    assert index.shard(1).bucket.tolist() == [4, 0]
    monkeypatch.setattr(sys, "argv", ["data", str(tmp_path)])
    command.main()
    again = load_index(tmp_path)
    assert np.array_equal(again.bucket_counts, index.bucket_counts)


def test_a_bucket_that_the_network_cannot_take_is_refused(index):
    tree = {"name": "a", "train": {"duration": {"steps": 1}}, "data": {"path": str(index.root), "buckets": True}}
    tree["data"]["streams"], tree["train"]["global_batch"] = STREAMS, BATCH
    for patch, fits in ((4, True), (8, False)):
        tree["model"] = {"kind": "pixart", "hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": patch}
        config = parse_config(tree, "test")
        if fits:
            check_data(config, index)
            continue
        with pytest.raises(ConfigError, match=r"data\.buckets: .* 96x64 pixels, .* divisible by 64"):
            check_data(config, index)


def test_data_without_buckets_is_refused(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for i in range(9):
            writer.write({"__key__": f"{i}", "png": encoded(8, 8), "txt": "a"})
    config = DataConfig(path=str(tmp_path), buckets=True, streams=2)
    with pytest.raises(DataError, match="--buckets 256"):
        make_order(config, load_index(tmp_path), 0, 4)
    file = ShardFile(tmp_path / "part.tar")
    file.write({"__key__": "a", "png": b"x", "__bucket__": 0})
    file.write({"__key__": "b", "png": b"x"})
    with pytest.raises(DataError, match=r"1 of 2 samples have a __bucket__"):
        file.commit()
