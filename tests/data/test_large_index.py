"""Indexes of many shards: arrays beside index.json, parts of the work, and the order as it was first defined."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dico_t2i import randomness
from dico_t2i.data import __main__ as command
from dico_t2i.data import index as indexes
from dico_t2i.data import table
from dico_t2i.data.buckets import assign_buckets, bucket_shapes
from dico_t2i.data.errors import DataError, ShardError
from dico_t2i.data.index import join_parts, load_index, write_index
from dico_t2i.data.names import Names
from dico_t2i.data.order import Order
from dico_t2i.data.shard import ShardSummary
from dico_t2i.data.writer import ShardWriter
from evals import index_scale
from tests.shards import image_bytes

META = {"crop": "none", "buckets": [[64, 64]]}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Seven shards of images, the last with fewer."""
    with ShardWriter(tmp_path / "set", 3) as writer:
        for number in range(20):
            writer.write({"__key__": f"{number:03d}", "jpg": image_bytes(number, (60, 40 + 4 * number))})
    return tmp_path / "set"


@pytest.fixture
def arrays(folder, monkeypatch) -> Path:
    """The arrays of a folder of few shards."""
    monkeypatch.setattr(table, "MIN_SHARDS", 1)
    write_index(folder, "images", META)
    return folder / "index.arrays"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["data", *map(str, arguments)])
    command.main()


def same(one, other) -> bool:
    """Whether two indexes have the same content."""
    arrays = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("samples", "bytes"))
    return arrays and (one.names, one.kind, one.meta) == (other.names, other.kind, other.meta)


def test_names_are_a_sequence_of_texts():
    names = Names.of(["a.tar", "ü.tar", "\udcff.tar"])
    assert list(names) == ["a.tar", "ü.tar", "\udcff.tar"] == [names[0], names[1], names[-1]]
    assert names[1:] == ("ü.tar", "\udcff.tar")
    assert names.index("ü.tar") == 1
    assert Names.joined([("x/", names[:1]), ("long/", names[:2])]) == ("x/a.tar", "long/a.tar", "long/ü.tar")


@pytest.mark.parametrize("names", [["a", ".."], ["a", "."], ["", "a"], ["a", "b/c"], ["b", "a", "b"]])
def test_names_that_are_not_those_of_different_files_are_told(names):
    assert Names.of(names).problem()
    assert Names.of(["b", "a"]).problem() is None


@pytest.mark.parametrize("name", ["a\0", "a\0b", "a" * 5000])
def test_names_that_no_file_has_are_refused(name):
    with pytest.raises(ValueError, match="too long or has a zero byte"):
        Names.of([name])


@pytest.mark.parametrize("lock", [True, False])
def test_an_index_opens_from_its_arrays_alone(arrays, monkeypatch, lock):
    whole = indexes._parsed((arrays.parent / "index.json").read_bytes())
    monkeypatch.setattr(table, "lock", lambda pages: lock)
    monkeypatch.setattr(indexes, "_parsed", None)
    opened = load_index(arrays.parent)
    assert same(opened, whole)
    assert opened.meta == META
    assert opened.samples.flags.writeable is not lock  # a copy, if the pages cannot be kept


def test_few_shards_have_no_arrays(arrays, monkeypatch):
    monkeypatch.undo()
    write_index(arrays.parent)
    assert not arrays.exists()


def test_arrays_of_another_or_a_damaged_index_are_ignored(arrays):
    file, content = arrays.with_name("index.json"), arrays.read_bytes()
    known = json.loads(file.read_text())
    file.write_text(json.dumps({**known, "meta": {"new": 1}}))
    assert load_index(arrays.parent).meta == {"new": 1}
    file.write_text(json.dumps(known, indent=1) + "\n")
    rng = np.random.default_rng(0)
    for turn in range(60):
        damaged = bytearray(content)
        damaged[int(rng.integers(0, len(content)))] ^= int(rng.integers(1, 256))
        arrays.write_bytes(damaged if turn else content[:-9])
        assert same(load_index(arrays.parent), indexes._parsed(file.read_bytes())), bytes(damaged[:400])


def test_one_process_compares_the_sizes(folder):
    (folder / "shard-000003.tar").unlink()
    assert len(load_index(folder, check=False)) == 20
    with pytest.raises(ShardError, match=r"shard-000003\.tar \(missing"):
        load_index(folder)


@pytest.mark.parametrize("buckets", [(), ("--buckets", 64)])
def test_two_parts_make_the_index_of_the_whole(folder, monkeypatch, capsys, buckets):
    write_index(folder, "images", {"kept": 1}, rebuild=True)
    whole = assign_buckets(folder, bucket_shapes(64)) if buckets else load_index(folder)
    written, tables = (folder / "index.json").read_bytes(), [whole.shard(shard) for shard in range(7)]
    for file in folder.glob("*.tar.index"):
        file.unlink()
    run(monkeypatch, folder, "--part", "1/2", *buckets)
    assert "other parts have shards left" in capsys.readouterr().out
    assert len(list(folder.glob("*.tar.index"))) == 3
    run(monkeypatch, folder, "--part", "0/2", *buckets)
    assert "20 samples in 7 shards (images)" in capsys.readouterr().out
    assert (folder / "index.json").read_bytes() == written
    for shard, known in enumerate(tables):
        assert np.array_equal(whole.shard(shard).crc32, known.crc32)
        assert np.array_equal(whole.shard(shard).bucket, known.bucket) or not buckets


def test_a_part_goes_on_where_it_stopped(folder, monkeypatch, capsys):
    tars = sorted(folder.glob("*.tar"))
    for tar in (tars[2], tars[4]):
        tar.with_name(tar.name + ".index").unlink()
    with tars[5].open("ab") as file:
        file.write(bytes(512))
    read = []
    monkeypatch.setattr(indexes, "index_shard", lambda tar: read.append(tar.name) or real(tar))
    run(monkeypatch, folder, "--part", "0/2")
    assert read == [tars[2].name, tars[4].name]
    assert "other parts have shards left" in capsys.readouterr().out  # one is of the size before
    run(monkeypatch, folder, "--part", "1/2")
    assert read[2:] == [tars[5].name]
    assert load_index(folder).bytes[5] == tars[5].stat().st_size


real = indexes.index_shard


def test_latents_keep_their_shapes(folder, monkeypatch):
    with ShardWriter(folder / "latents", kind="latents") as writer:
        writer.write({"__key__": "a", "moments.npy": b"x"})
    with pytest.raises(SystemExit, match="assign buckets to images before encoding"):
        run(monkeypatch, folder / "latents", "--part", "0/1", "--buckets", 64)
    with pytest.raises(DataError, match="no shards"):
        join_parts(folder.parent)


def old_permutation(seed, purpose, index, size):
    both = randomness.words(seed, purpose, torch.tensor([index]), 2 * size)[0].reshape(size, 2)
    return np.argsort(((both[:, 0] << 30) | (both[:, 1] >> 2)).numpy(), kind="stable")


def old_place(seed, sizes, streams, shuffle_block, position):
    """The shard and the member of a position, as the order was first written: one block and one position at a time."""
    run = sizes.sum() // streams
    epoch, within = divmod(position, run * streams)
    entry, stream = divmod(within, streams)
    block, offset = divmod(entry, shuffle_block)
    name = (epoch * streams + stream) * -(-run // shuffle_block) + block
    size = min(shuffle_block, run - block * shuffle_block)
    shuffled = old_permutation(seed, "samples", int(name), int(size))[offset]
    sample = stream * run + block * shuffle_block + shuffled
    shards = old_permutation(seed, "shards", int(epoch), len(sizes))
    starts = np.cumsum(sizes[shards]) - sizes[shards]
    place = np.searchsorted(starts, sample, side="right") - 1
    return shards[place], sample - starts[place]


def test_many_permutations_are_those_of_single_calls():
    for size in (0, 1, 2, 7, 100, 9000):
        indices = np.array([0, 5, 2**33 + 1])
        together = randomness.permutations(2**40 + 7, "x", indices, size)
        assert together.tolist() == [old_permutation(2**40 + 7, "x", int(n), size).tolist() for n in indices]


def test_a_million_samples(tmp_path):
    """The benchmark's data set: parts equal to the whole, the first order, and what a rank does at the start."""
    root = tmp_path / "data"
    index_scale.make(root, 10**6, ranks=1)
    written = (root / "index.json").read_bytes()
    whole = load_index(root)
    (root / "index.json").unlink()
    assert join_parts(root) is not None  # the kind and the metadata were in index.json
    joined = json.loads((root / "index.json").read_bytes())
    assert joined["shards"] == json.loads(written)["shards"]
    assert len(whole) == 10**6
    order = Order(3, whole.samples, streams=64, shuffle_block=1024)
    jump = int(2.5 * order.epoch_length)
    edge = order.epoch_length - 3  # the last entries of an epoch and the first of the next
    positions = np.array([0, 1, 63, 64, 200_000, edge, edge + 2, edge + 3, jump, jump + 1, 10**12])
    places = zip(*(part.tolist() for part in order.locate(positions)), strict=True)
    assert list(places) == [old_place(3, whole.samples, 64, 1024, int(position)) for position in positions]
    assert list(index_scale.rank_start(root, rank=0)) == ["open", "open, sizes", "order", "seek", "read"]


def test_the_header_of_a_shards_index_has_its_counts(folder):
    assign_buckets(folder, bucket_shapes(64))
    index = load_index(folder)
    for shard in range(7):
        summary, known = ShardSummary.load(folder / f"{index.names[shard]}.index"), index.shard(shard).summary
        assert summary._replace(bucket=None) == known._replace(bucket=None)
        assert np.array_equal(summary.bucket, known.bucket)
        assert (summary.samples, summary.shapes) == (index.samples[shard], tuple(bucket_shapes(64)))
