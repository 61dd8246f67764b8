import io
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dico_t2i.config import DataConfig
from dico_t2i.data.batches import Wanted
from dico_t2i.data.errors import DataError, SampleError
from dico_t2i.data.index import load_index
from dico_t2i.data.loader import Share, make_loader
from dico_t2i.data.order import Order
from dico_t2i.data.sample import captions_of
from dico_t2i.data.writer import ShardWriter
from tests import forkserver

SAMPLES, STREAMS, BATCH = 60, 4, 8
SHARED = Path(__file__).resolve().parents[3] / "shared"


def png(number, left=None):
    """An 8x8 image that tells its sample's number; red left half on demand, to tell mirror images."""
    image = Image.new("RGB", (8, 8), (number, 0, 0))
    if left is not None:
        image.paste((number, 255, 0), (0, 0, 4, 8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_sample(number, **changes):
    captions = [f"{number}:{i}" for i in range(1 + number % 5)]
    sample = {
        "__key__": f"{number:04d}",
        "png": png(number, left=True),
        "json": {"captions": captions},
        "cls": number,
    }
    return {name: value for name, value in {**sample, **changes}.items() if value is not None}


def build(root, samples):
    with ShardWriter(root, samples_per_shard=7) as writer:
        for sample in samples:
            writer.write(sample)
    return load_index(root)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return build(tmp_path_factory.mktemp("set"), map(make_sample, range(SAMPLES)))


def tokenize(captions):
    return torch.tensor([[int(part) for part in caption.split(":")] for caption in captions])


def loader(
    index, *, workers=0, condition="text", rank=0, world=1, start_step=0, micro_batch=2, classes=None, **options
):
    config = DataConfig(
        path=str(index.root), image_size=8, streams=STREAMS, shuffle_block=5, workers=workers, **options
    )
    order = Order(3, index.samples, config.streams, config.shuffle_block)
    return make_loader(
        config,
        index,
        order,
        Share(BATCH, micro_batch, rank, world),
        Wanted(condition, classes, tokenize if condition == "text" else None),
        seed=3,
        start_step=start_step,
    )


def rows(batches):
    """One comparable row per sample, by position."""
    found = {}
    for batch in batches:
        for i, position in enumerate(batch.positions.tolist()):
            assert position not in found
            found[position] = (batch.keys[i], batch.captions[i], batch.images[i].numpy().tobytes())
    return found


def steps(index, count, *, world=1, micro_batch=2, **options):
    """Rows of ``count`` steps, of all ranks."""
    per_step = BATCH // world // micro_batch
    found = {}
    for rank in range(world):
        batches = loader(index, rank=rank, world=world, micro_batch=micro_batch, **options)
        part = rows(islice(batches, count * per_step))
        assert not set(part) & set(found)
        found.update(part)
    return found


@pytest.fixture(scope="module")
def expected(index):
    return steps(index, 12)


@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 11), world=st.sampled_from([1, 2, 4]), micro_batch=st.sampled_from([1, 2]))
def test_any_world_size_and_start_gives_the_same_global_batches(index, expected, start, world, micro_batch):
    found = steps(index, 12 - start, world=world, start_step=start, micro_batch=micro_batch)
    assert found == {p: row for p, row in expected.items() if p >= start * BATCH}


@pytest.mark.parametrize("world", [1, 2])
def test_workers_give_the_same_batches_in_the_same_order(index, world):
    def first(workers):
        batches = loader(index, workers=workers, rank=world - 1, world=world, start_step=2)
        return [(b.positions.tolist(), b.keys, b.captions, b.images) for b in islice(batches, 9)]

    alone, two = first(0), first(2)
    assert [batch[:3] for batch in alone] == [batch[:3] for batch in two]
    assert all(torch.equal(a[3], b[3]) for a, b in zip(alone, two, strict=True))


def test_a_batch_holds_what_belongs_together(index):
    for batch in islice(loader(index, flip=False), 20):
        numbers = [int(key) for key in batch.keys]
        assert batch.images.shape == (2, 3, 8, 8)
        assert batch.images.dtype == torch.uint8
        assert batch.images[:, 0, 0, 0].tolist() == numbers
        assert [int(caption.split(":")[0]) for caption in batch.captions] == numbers
        assert torch.equal(batch.tokens, tokenize(batch.captions))
        assert batch.labels is None
        assert batch.moments is None
        assert batch.bad == []


def test_classes_come_as_labels(index):
    batch = next(iter(loader(index, condition="class")))
    assert batch.labels.tolist() == [int(key) for key in batch.keys]
    assert batch.labels.dtype == torch.int64
    assert batch.captions is None
    assert batch.tokens is None


def test_captions_and_flips_are_drawn_anew_for_each_position(index):
    batches = list(islice(loader(index), 30 * 30))  # 30 epochs of 60 samples
    captions = np.array([caption for b in batches for caption in b.captions if caption.startswith("4:")])
    assert sorted(set(captions.tolist())) == [f"4:{i}" for i in range(5)]
    mirrored = torch.cat([b.images[:, 1, 0, 7] == 255 for b in batches]).double().mean()
    assert abs(mirrored - 0.5) < 4 * 0.5 / len(batches * 2) ** 0.5
    never = torch.cat([b.images[:, 1, 0, 7] for b in islice(loader(index, flip=False), 30)])
    assert never.max() == 0


def test_bad_samples_are_replaced_and_listed(tmp_path):
    changes = {
        3: {"png": b"no image"},
        11: {"json": {"captions": []}},
        20: {"json": b"{broken"},
        25: {"json": {"captions": [1, None]}},
        31: {"png": None},
        40: {"json": None},
        44: {"png": png(44)[:45]},
    }
    samples = [make_sample(i, **changes.get(i, {})) for i in range(SAMPLES)]
    samples[50] = make_sample(50, json=None, txt="50:9")
    index = build(tmp_path, samples)
    flipped = bytearray(index.path(1).read_bytes())
    flipped[int(index.shard(1).offsets[0, index.shard(1).extensions.index("png")])] ^= 8
    index.path(1).write_bytes(flipped)
    reasons = {7: "checksum", 3: "decoded", 11: "no caption", 20: "captions cannot be read", 44: "decoded"}
    reasons |= {25: "captions cannot be read", 31: "no jpg or jpeg or png", 40: "no txt"}

    epoch = list(islice(loader(index), SAMPLES // 2))
    bad = [entry for batch in epoch for entry in batch.bad]
    assert {int(entry.key) for entry in bad} == set(reasons)
    for entry in bad:
        assert reasons[int(entry.key)] in entry.reason
        assert entry.shard == f"shard-{int(entry.key) // 7:06d}.tar"
    keys = {int(key) for batch in epoch for key in batch.keys}
    assert keys == set(range(SAMPLES)) - set(reasons)
    captions = [caption for batch in epoch for caption in batch.captions]
    assert "50:9" in captions
    replaced = {entry.position for entry in bad}
    order = Order(3, index.samples, STREAMS, 5)
    by_position = rows(epoch)
    for position in replaced:
        attempts = sum(entry.position == position for entry in bad)
        shard, member = order.locate(np.array([order.successor(position, attempts)]))
        assert int(by_position[position][0]) == shard[0] * 7 + member[0]

    assert steps(index, 6, world=2) == steps(index, 6, workers=2)


def test_labels_that_are_no_numbers_are_replaced(tmp_path):
    texts = ("", "cat", "-1", "9" * 30, "1.5", "\u0663", " 4\n")
    labels = dict(enumerate(text.encode() for text in texts))
    index = build(tmp_path, [make_sample(i, cls=labels.get(i, b"7")) for i in range(SAMPLES)])
    epoch = list(islice(loader(index, condition="class"), SAMPLES // 2))
    assert {int(entry.key) for batch in epoch for entry in batch.bad} == set(range(6))
    assert {label for batch in epoch for label in batch.labels.tolist()} == {4, 7}
    epoch = list(islice(loader(index, condition="class", classes=7), 1))
    assert any("cls is 7, but model.num_classes ends at 6" in entry.reason for entry in epoch[0].bad)
    assert set(epoch[0].labels.tolist()) == {4}


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_in_a_row_stop_with_the_shard_named(tmp_path, workers):
    index = build(tmp_path, [make_sample(i, png=b"no image") for i in range(SAMPLES)])
    with pytest.raises(DataError, match=r"shard-00000\d\.tar: more than 100 .*no image|cannot be decoded"):
        next(iter(loader(index, workers=workers)))


def test_a_shard_that_vanishes_is_replaced(tmp_path):
    index = build(tmp_path, map(make_sample, range(SAMPLES)))
    index.path(4).unlink()
    epoch = list(islice(loader(index), SAMPLES // 2))
    assert {entry.shard for batch in epoch for entry in batch.bad} == {index.names[4]}
    assert not {int(key) // 7 for batch in epoch for key in batch.keys} & {4}


def build_latents(root, mirrored, broken=(), **meta):
    rng = np.random.default_rng(0)
    shape = (2, 8, 1, 1) if mirrored else (8, 1, 1)
    known = {"latent_channels": 4, "latent_size": 1, "image_size": 8, "crop": "center", "mirrored": mirrored}
    moments = {}
    with ShardWriter(root, 7, "latents", {**known, **meta}) as writer:
        for i in range(SAMPLES):
            moments[i] = rng.normal(size=shape).astype(np.float16)
            if i in broken:
                moments[i] = broken[i]
            writer.write({"__key__": f"{i:04d}", "moments.npy": moments[i], "cls": i})
    return load_index(root), moments


def test_latents_come_mirrored_where_they_are_stored_so(tmp_path):
    index, moments = build_latents(tmp_path, mirrored=True)
    chosen = []
    for batch in islice(loader(index, condition="class"), 30):
        assert batch.images is None
        assert (batch.moments.shape, batch.moments.dtype) == ((2, 8, 1, 1), torch.float16)
        for key, found in zip(batch.keys, batch.moments.numpy(), strict=True):
            chosen.append(int(np.array_equal(found, moments[int(key)][1])))
            assert np.array_equal(found, moments[int(key)][chosen[-1]])
    assert 10 < sum(chosen) < 50


def test_latents_that_cannot_be_used_are_replaced(tmp_path):
    wrong = np.zeros((8, 1, 1), np.float16)
    broken = {5: wrong[:, :, :0], 6: wrong * np.nan, 7: wrong.astype(np.float32), 8: np.stack([wrong, wrong])}
    index, moments = build_latents(tmp_path, mirrored=False, broken=broken)
    epoch = list(islice(loader(index, condition="class"), SAMPLES // 2))
    assert {int(entry.key) for batch in epoch for entry in batch.bad} == set(broken)
    for batch in epoch:
        for key, found in zip(batch.keys, batch.moments.numpy(), strict=True):
            assert np.array_equal(found, moments[int(key)])


@pytest.mark.parametrize("meta", [{"image_size": 16}, {"crop": "resize"}, {"latent_size": None}])
def test_latents_of_other_images_are_refused(tmp_path, meta):
    index, _ = build_latents(tmp_path, mirrored=False, **meta)
    with pytest.raises(DataError, match=f"index.json: .*{next(iter(meta))}"):
        loader(index, condition="class")


def test_a_micro_batch_that_does_not_divide_is_refused(index):
    with pytest.raises(DataError, match="micro-batch 3 does not divide the 8 samples"):
        loader(index, micro_batch=3)


def children():
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has just ended
            found.update(map(int, task.joinpath("children").read_text().split()))
    return found


def test_workers_leave_signals_to_the_trainer(index):
    before = children()
    batches = iter(loader(index, workers=2))
    next(batches), next(batches)  # one from each worker: both are set up
    workers = children() - before
    assert len(workers) == 2
    for name in ("TERM", "USR1", "USR2", "INT"):
        subprocess.run(["kill", "-s", name, *map(str, workers)], check=True)
    assert len([next(batches) for _ in range(30)]) == 30
    del batches
    assert not children() & workers


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "1 / 0"])
def test_workers_end_with_the_trainer(index, end):
    script = f"""
import os, signal, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from test_loader import children, load_index, loader
batches = iter(loader(load_index({str(index.root)!r}), workers=2))
next(batches)
print(*children(), flush=True)
{end}
"""
    ended = forkserver.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False, timeout=120)
    workers = [int(worker) for worker in ended.stdout.split()]
    assert len(workers) == 2
    for _ in range(600):
        if not any(Path(f"/proc/{worker}/stat").exists() for worker in workers):
            return
        time.sleep(0.1)
    raise AssertionError(f"workers {workers} outlived their parent by a minute")


def test_real_photographs_come_through(tmp_path):
    folder = SHARED / "data" / "tiny_coco"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    notes = json.loads((folder / "annotations" / "captions_train2017.json").read_text())["annotations"]
    captions = {}
    for note in notes:
        captions.setdefault(note["image_id"], []).append(note["caption"])
    photographs = sorted((folder / "train2017").glob("*.jpg"))[:12]
    samples = [
        {
            "__key__": path.stem,
            "jpg": path.read_bytes(),
            "json": {"captions": captions[int(path.stem)]},
        }
        for path in photographs
    ]
    index = build(tmp_path, samples)
    config = DataConfig(path=str(tmp_path), image_size=64, streams=2, workers=0)
    order = Order(0, index.samples, 2, 8)
    batches = make_loader(
        config,
        index,
        order,
        Share(4, 4),
        Wanted("text", tokenize=None),
        seed=0,
    )
    epoch = list(islice(batches, 3))
    assert sorted(key for batch in epoch for key in batch.keys) == [path.stem for path in photographs]
    for batch in epoch:
        assert batch.images.shape == (4, 3, 64, 64)
        assert batch.images.double().std() > 30
        assert all(c in captions[int(key)] for key, c in zip(batch.keys, batch.captions, strict=True))


@pytest.mark.parametrize(
    ("members", "caption"),
    [
        ({"txt": "ünï".encode("utf-8-sig")}, "ünï"),
        ({"txt": "ünï".encode("utf-16")}, "ünï"),
        ({"txt": "“ünï”".encode("cp1252")}, "“ünï”"),
        ({"json": {"captions": "one text"}}, "one text"),
        ({"json": json.dumps({"captions": ["ünï"]}).encode("utf-16")}, "ünï"),
        ({"json": b'{"captions": ["a\\ud800b", " "]}'}, "a\ufffdb"),
        ({"txt": "ünï".encode("utf-16-be")}, None),
        ({"txt": b"\x81\x00\x02"}, None),
    ],
)
def test_captions_in_any_encoding_are_read_or_refused(members, caption):
    sample = {name: v if isinstance(v, bytes) else json.dumps(v).encode() for name, v in members.items()}
    if caption is not None:
        assert captions_of(sample) == [caption]
        return
    with pytest.raises(SampleError, match="captions cannot be read"):
        captions_of(sample)


@pytest.mark.parametrize("condition", ["text", "class"])
def test_data_workers_leave_the_gpu_alone(index, monkeypatch, condition):
    """They are forks of a process that uses CUDA, so that their first use of it would fail. Here it does."""
    batches, parent = loader(index, workers=2, condition=condition), os.getpid()
    for module, name in ((torch.cuda, "_lazy_init"), (torch.cuda, "is_available"), (torch._C, "_cuda_getDeviceCount")):
        original = getattr(module, name)

        def guarded(*args, _original=original, _name=name, **kwargs):
            if os.getpid() != parent:
                raise AssertionError(f"a data worker called {_name}")
            return _original(*args, **kwargs)

        monkeypatch.setattr(module, name, guarded)
    assert sum(len(batch.positions) for batch in islice(batches, 6)) == 12
