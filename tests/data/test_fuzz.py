"""Mutated shards, indexes and images: nothing crashes or hangs, and what cannot be used is counted."""

import io
import os
import tarfile
import time
import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from test_loader import make_sample

from dico_t2i.config import DataConfig
from dico_t2i.data import shard as shard_module
from dico_t2i.data import tar
from dico_t2i.data.batches import Wanted
from dico_t2i.data.decode import decode_image, decode_moments
from dico_t2i.data.errors import DataError, SampleError, ShardError
from dico_t2i.data.index import load_index
from dico_t2i.data.loader import Share, make_loader
from dico_t2i.data.order import Order
from dico_t2i.data.reader import ShardReader
from dico_t2i.data.shard import ShardIndex, index_shard
from dico_t2i.data.writer import ShardWriter

LIMIT_S = 60.0  # of this process's CPU, for one input; most take a millisecond


def mutate(data, rng):
    """Some flipped bits, a cut, a splice, a repeated or a zeroed stretch."""
    data = bytearray(data)
    kind = int(rng.integers(6))
    low, high = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    if kind == 0:
        for at in rng.integers(0, len(data), 1 + int(rng.integers(8))).tolist():
            data[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del data[low:]
    elif kind == 2:
        del data[low:high]
    elif kind == 3:
        data[low:low] = data[low:high][:4096]
    elif kind == 4:
        data[low : min(high, low + 512)] = bytes(min(high, low + 512) - low)
    else:
        data[low : low + 16] = rng.bytes(16)
    return bytes(data)


def timed(work, *arguments):
    """The result of ``work``, or the error of one of our kinds; anything else is raised."""
    started = time.process_time()
    try:
        return work(*arguments)
    except (SampleError, ShardError, DataError) as error:
        return error
    finally:
        assert time.process_time() - started < LIMIT_S


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pictures():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:40, 0:56]
    waves = np.stack([128 + 90 * np.sin(x / 7), 128 + 90 * np.cos(y / 5), 2 * x + 2 * y], -1).astype(np.uint8)
    image = Image.fromarray(waves)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)) for _ in range(3)]
    return {
        "jpeg": encoded(image, "JPEG", quality=90),
        "progressive": encoded(image, "JPEG", progressive=True),
        "grey jpeg": encoded(image.convert("L"), "JPEG"),
        "cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "rotated": encoded(image, "JPEG", exif=exif),
        "png": encoded(image, "PNG"),
        "16 bits": encoded(Image.fromarray(waves[..., 0].astype(np.uint16) << 8), "PNG"),
        "transparent": encoded(image.convert("RGBA"), "PNG"),
        "palette": encoded(image.convert("P"), "PNG"),
        "webp": encoded(image, "WEBP"),
        "animated webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "bmp": encoded(image, "BMP"),
    }


@pytest.mark.filterwarnings("ignore")
def test_images():
    rng = np.random.default_rng(1)
    outcomes = Counter()
    for name, data in pictures().items():
        assert isinstance(decode_image(data, 32, "center"), torch.Tensor), name
        for _ in range(70):
            found = timed(decode_image, mutate(data, rng), (32, 64) if rng.integers(2) else 32, "center")
            outcomes[type(found).__name__] += 1
            assert isinstance(found, SampleError) or found.shape[0] == 3
    assert sum(outcomes.values()) == 910
    assert outcomes["SampleError"] > 200
    assert outcomes["Tensor"] > 50


def test_moments():
    rng = np.random.default_rng(2)
    buffer = io.BytesIO()
    np.save(buffer, rng.normal(size=(8, 4, 4)).astype(np.float16))
    outcomes = Counter()
    for _ in range(300):
        found = timed(decode_moments, mutate(buffer.getvalue(), rng), (8, 4, 4))
        outcomes[type(found).__name__] += 1
        assert isinstance(found, SampleError) or torch.isfinite(found).all()
    assert set(outcomes) == {"SampleError", "Tensor"}


def headers(data, rng):
    """A field of one of the tar's headers set to something extreme, its checksum made right again."""
    data = bytearray(data)
    starts = [at for at in range(0, len(data) - 512, 512) if data[at + 257 : at + 262] == b"ustar"]
    at = starts[int(rng.integers(len(starts)))]
    sizes = [b"77777777777\0", b"-0000000001\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"00000000000\0", rng.bytes(12)]
    edits = [
        (124, sizes[int(rng.integers(len(sizes)))]),
        (156, bytes([b"0123456LKxgXS7V\0"[int(rng.integers(16))]])),
        (0, [b"../../etc/passwd.jpg\0", b"/abs.jpg\0", b"\xff\xfe.jpg\0", b"a.pyd\0", b".\0"][int(rng.integers(5))]),
        (345, rng.bytes(20)),
    ]
    for offset, value in (edits[i] for i in rng.integers(0, 4, 2).tolist()):
        data[at + offset : at + offset + len(value)] = value
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzzed")
    with ShardWriter(root) as writer:
        for i in range(6):
            writer.write({**make_sample(i), "pyd": b"cos\nsystem\n(S'false'\ntR."})
    return root / "shard-000000.tar"


def test_tars(shard, tmp_path):
    rng = np.random.default_rng(3)
    content, target = shard.read_bytes(), tmp_path / "mutated.tar"
    whole, outcomes = len(index_shard(shard)), Counter()
    for turn in range(500):
        target.write_bytes((headers if turn % 2 else mutate)(content, rng))
        found = timed(index_shard, target)
        assert (found.offsets + found.sizes <= found.tar_bytes).all()
        keys = [found.key(row) for row in range(len(found))]
        assert not any(key.startswith("/") or ".." in key.split("/") for key in keys)
        outcomes["damaged" if found.damage else "fewer" if len(found) < whole else "whole"] += 1
    assert outcomes["damaged"] > 100


def test_indexes(shard, tmp_path):
    rng = np.random.default_rng(4)
    source = shard.with_name(shard.name + ".index")
    content, outcomes = source.read_bytes(), Counter()
    root = tmp_path / "set"
    root.mkdir()
    os.link(shard, root / shard.name)
    (root / "index.json").write_bytes(shard.with_name("index.json").read_bytes())
    dataset = load_index(root)
    for _ in range(250):
        (root / source.name).write_bytes(mutate(content, rng))
        found = timed(ShardIndex.load, root / source.name)
        outcomes[type(found).__name__] += 1
        reader = ShardReader(dataset)
        for member in range(6):
            sample = timed(reader.read, 0, member)
            assert isinstance(sample, SampleError) or "__key__" in sample
        reader.close()
    assert outcomes["ShardError"] > 50
    assert outcomes["ShardIndex"] > 5  # keys and checksums changed: told at the sample


def test_index_json(shard, tmp_path):
    rng = np.random.default_rng(5)
    content = shard.with_name("index.json").read_bytes()
    os.link(shard, tmp_path / shard.name)
    os.link(shard.with_name(shard.name + ".index"), tmp_path / f"{shard.name}.index")
    outcomes = Counter()
    extreme = [b"-1", b"1e400", b"99999999999999999999999", b"null", b'"x"', b"[" * 5000, b"NaN"]
    for turn in range(200):
        data = content.replace(b"6", extreme[turn % 7]) if turn < 7 else mutate(content, rng)
        (tmp_path / "index.json").write_bytes(data)
        outcomes[type(timed(load_index, tmp_path)).__name__] += 1
    assert outcomes["DataError"] + outcomes["ShardError"] > 100


def test_samples_through_the_loader_are_all_counted(tmp_path):
    """Members mutated before they are written, so that checksums are right: each is used, or replaced and listed."""
    rng = np.random.default_rng(6)
    files = list(pictures().values())
    texts = ["plain", "ünï", "a\ud800b"]
    captions = [
        *(text.encode(code, "ignore") for text in texts for code in ("utf-8-sig", "utf-16", "latin-1", "utf-16-be")),
        *(b"", b"\0", b"\xff\xfe", b" \n", b"\x81\x8d", rng.bytes(20)),
    ]
    jsons = [b"{}", b"[1]", b'{"captions": "one"}', b'{"captions": ["a\\ud800b"]}', b'{"captions": {}}', b"[" * 100_000]
    with ShardWriter(tmp_path, 20) as writer:
        for i in range(240):
            data = files[i % len(files)]
            members = {"jpg": mutate(data, rng) if i % 3 == 0 else data, "txt": captions[i % len(captions)]}
            if i % 5 == 0:
                members["json"] = jsons[i // 5 % len(jsons)]
            writer.write({"__key__": f"{i:04d}", "pkl": b"cos\nabort\n(tR.", **members})
    dataset = load_index(tmp_path)
    config = DataConfig(path=str(tmp_path), image_size=32, streams=4, workers=0)
    order = Order(0, dataset.samples, 4, 1024)
    loader = make_loader(config, dataset, order, Share(8, 8), Wanted("text", tokenize=tokens), seed=0)
    batches = list(islice(loader, 30))
    bad = {entry.key for batch in batches for entry in batch.bad}
    used = {key for batch in batches for key in batch.keys}
    assert not bad & used
    assert bad | used == {f"{i:04d}" for i in range(240)}
    assert 40 < len(bad) < 200
    assert {"captions cannot be read", "image cannot be decoded", "has no caption"} <= {
        entry.reason.split(":")[0] for batch in batches for entry in batch.bad
    }


def tokens(captions):
    """As strict as a tokenizer: the text must be valid, and not blank."""
    assert all(caption.strip() for caption in captions)
    return torch.tensor([len(caption.encode()) for caption in captions])


@pytest.mark.parametrize("kind", [b"L", b"x"])
def test_headers_that_claim_megabytes_are_not_read_into_memory(tmp_path, monkeypatch, kind):
    for module in (shard_module, tar):
        monkeypatch.setattr(module, "CHUNK", 1 << 20)
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf())
    header[124:136] = b"%011o\0" % (1 << 23)
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    member = tarfile.TarInfo("z.jpg")
    member.size = 4
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(header + member.tobuf() + b"data")
        file.truncate(1 << 23)  # the bytes are there to be read
    tracemalloc.start()
    found = index_shard(tmp_path / "a.tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6
    assert [found.key(row) for row in range(len(found))] == ["z"]  # what follows is found
    assert found.damage
