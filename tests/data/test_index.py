import dataclasses
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dico_t2i.data import __main__ as command
from dico_t2i.data.errors import DataError, ShardError
from dico_t2i.data.index import load_index, write_index
from dico_t2i.data.shard import ShardIndex, index_shard
from dico_t2i.data.writer import ShardFile, ShardWriter


def make_samples(count):
    rng = np.random.default_rng(0)
    return [
        {"__key__": f"{i:05d}", "jpg": rng.bytes(100 + 700 * (i % 3)), "json": {"captions": [f"number {i}"]}}
        for i in range(count)
    ]


def write(root, count=10, **options):
    with ShardWriter(root, **options) as writer:
        for sample in make_samples(count):
            writer.write(sample)
    return load_index(root)


def member_bytes(tar, shard, member, extension):
    column = shard.extensions.index(extension)
    offset, size = shard.offsets[member, column], shard.sizes[member, column]
    return Path(tar).read_bytes()[offset : offset + size]


def add(tar, name, data=b"data", **attributes):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    tar.addfile(info, io.BytesIO(data))


def test_written_shards_are_read_back_by_index_and_by_webdataset(tmp_path):
    index = write(tmp_path / "set", 10, samples_per_shard=4, meta={"source": "test"})
    samples = make_samples(10)
    assert index.names == ("shard-000000.tar", "shard-000001.tar", "shard-000002.tar")
    assert (index.samples.tolist(), index.kind, index.meta) == ([4, 4, 2], "images", {"source": "test"})
    assert len(index) == 10
    found = []
    for number in range(3):
        shard = index.shard(number)
        for member in range(len(shard)):
            found.append((shard.key(member), member_bytes(index.path(number), shard, member, "jpg")))
    assert found == [(sample["__key__"], sample["jpg"]) for sample in samples]
    urls = [str(index.path(number)) for number in range(3)]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [(sample["__key__"], sample["jpg"]) for sample in theirs] == found
    assert [json.loads(sample["json"]) for sample in theirs] == [sample["json"] for sample in samples]


def test_tar_bytes_depend_on_the_samples_alone(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert first.path(0).read_bytes() == second.path(0).read_bytes()


def test_shards_are_cut_by_bytes(tmp_path):
    index = write(tmp_path / "set", 9, max_bytes=900)  # images of 100, 800, 1500, 100, ... bytes
    assert index.samples.tolist() == [2, 1, 2, 1, 2, 1]


@pytest.mark.parametrize("value", [b"\0raw", "text é", 7, np.float16([[1, 2]]), {"captions": ["ü"]}])
def test_values_are_encoded_by_type(tmp_path, value):
    with ShardWriter(tmp_path) as writer:
        writer.write({"__key__": "k", "x": value})
    data = member_bytes(tmp_path / "shard-000000.tar", load_index(tmp_path).shard(0), 0, "x")
    if isinstance(value, np.ndarray):
        assert np.array_equal(np.load(io.BytesIO(data), allow_pickle=False), value)
    elif isinstance(value, dict):
        assert json.loads(data) == value
    else:
        assert data == (value if isinstance(value, bytes) else str(value).encode())


@pytest.mark.parametrize("key", ["", "a.b", "../a", "/a", "a/../b", "./a"])
def test_writer_refuses_keys_that_are_no_plain_names(tmp_path, key):
    with pytest.raises(DataError, match="is not a sample's name"), ShardWriter(tmp_path) as writer:
        writer.write({"__key__": key, "jpg": b"x"})
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_whole_shards_and_no_index(tmp_path):
    def fail():
        with ShardWriter(tmp_path, samples_per_shard=4) as writer:
            for sample in make_samples(6):
                writer.write(sample)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-000000.tar", "shard-000000.tar.index"]


def test_writer_refuses_a_folder_that_holds_shards(tmp_path):
    write(tmp_path)
    with pytest.raises(DataError, match="holds shards already"):
        ShardWriter(tmp_path)


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no shards"), ShardWriter(tmp_path):
        pass


def test_index_is_built_at_first_use(tmp_path):
    written = write(tmp_path, 10, samples_per_shard=4)
    before = [written.shard(number) for number in range(3)]
    for path in [*tmp_path.glob("*.index"), tmp_path / "index.json"]:
        path.unlink()
    built = load_index(tmp_path)
    assert (built.names, built.samples.tolist(), built.kind) == (written.names, [4, 4, 2], "images")
    for number, expected in enumerate(before):
        found = built.shard(number)
        assert found.extensions == expected.extensions
        for name in ("offsets", "sizes", "crc32", "key_bytes", "key_bounds"):
            assert np.array_equal(getattr(found, name), getattr(expected, name))


def test_kind_is_recognised_by_its_members(tmp_path):
    file = ShardFile(tmp_path / "part-7.tar")
    file.write({"__key__": "a", "moments.npy": np.zeros((8, 2, 2), np.float16), "cls": 3})
    file.commit()
    index = write_index(tmp_path)
    assert (index.kind, index.shard(0).extensions) == ("latents", ("cls", "moments.npy"))


def test_names_long_foreign_nested_and_upper_case(tmp_path):
    names = ["x" * 150 + ".jpg", "日本.jpg", "n01/a.jpg", "n02/a.JPG", "./b.seg.png"]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            add(tar, name)
    shard = index_shard(tmp_path / "a.tar")
    assert [shard.key(member) for member in range(5)] == ["x" * 150, "日本", "n01/a", "n02/a", "b"]
    assert shard.extensions == ("jpg", "seg.png")
    assert (shard.offsets < 0).tolist() == [[False, True]] * 4 + [[True, False]]
    assert shard.damage == ()


def test_hostile_members_are_left_out(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.jpg", b"")
        add(tar, "link.jpg", b"", type=tarfile.SYMTYPE, linkname=str(secret))
        add(tar, "hard.jpg", b"", type=tarfile.LNKTYPE, linkname="a.jpg")
        add(tar, "fifo.jpg", b"", type=tarfile.FIFOTYPE)
        add(tar, "folder.jpg", b"", type=tarfile.DIRTYPE)
        add(tar, "../../evil.jpg")
        add(tar, "a/../../evil.jpg")
        add(tar, f"{secret}")
        add(tar, ".hidden.jpg")
        add(tar, "plain")
        add(tar, "z.jpg")
    shard = index_shard(tmp_path / "a.tar")
    assert [shard.key(member) for member in range(len(shard))] == ["a", "z"]


def test_a_repeated_extension_starts_a_new_sample(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.jpg", b"1")
        add(tar, "a.jpg", b"2")
    shard = index_shard(tmp_path / "a.tar")
    assert [member_bytes(tmp_path / "a.tar", shard, i, "jpg") for i in range(2)] == [b"1", b"2"]


def test_a_tar_cut_anywhere_keeps_its_whole_samples(tmp_path):
    tar = write(tmp_path / "set", 3).path(0)
    content, whole = tar.read_bytes(), index_shard(tar)
    ends = [int((whole.offsets[i] + whole.sizes[i]).max()) for i in range(3)]
    image_ends = (whole.offsets + whole.sizes)[:, whole.extensions.index("jpg")].tolist()
    cut = tmp_path / "cut.tar"
    for size in [*range(0, ends[-1] + 512, 61), *ends, *image_ends]:
        cut.write_bytes(content[:size])
        shard = index_shard(cut)
        complete = sum(end <= size for end in ends)
        # A cut exactly behind an image leaves a sample that lacks the rest; reading it will say so.
        assert complete <= len(shard) <= complete + 1
        assert (shard.offsets + shard.sizes <= size).all()
        for member in range(complete):
            assert shard.key(member) == whole.key(member)
            assert member_bytes(cut, shard, member, "jpg") == member_bytes(tar, whole, member, "jpg")
        assert shard.damage, size


def test_what_lies_behind_a_zeroed_header_is_found(tmp_path):
    tar = write(tmp_path / "set", 5).path(0)
    whole = index_shard(tar)
    start = int(whole.offsets[2].min()) - 512
    content = bytearray(tar.read_bytes())
    content[start : start + 512] = bytes(512)
    tar.write_bytes(content)
    shard = index_shard(tar)
    keys = [shard.key(member) for member in range(len(shard))]
    assert [keys[0], keys[1], *keys[-2:]] == ["00000", "00001", "00003", "00004"]
    assert any(place.startswith(f"bytes {start} to") for place in shard.damage)


def test_joined_tars_are_one_shard(tmp_path):
    first, second = (write(tmp_path / name, 3).path(0).read_bytes() for name in "ab")
    (tmp_path / "both.tar").write_bytes(first + second)
    shard = index_shard(tmp_path / "both.tar")
    assert (len(shard), shard.damage) == (6, ())


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40))
def test_damaged_tars_never_crash_the_indexing(tmp_path_factory, seed, count):
    folder = tmp_path_factory.getbasetemp()
    source = folder / "fuzz-source"
    if not source.exists():
        write(source, 3)
    rng = np.random.default_rng(seed)
    content = np.frombuffer((source / "shard-000000.tar").read_bytes(), np.uint8).copy()
    at = rng.integers(0, 512, count) + rng.choice([0, 1024, 2048, 3072], count)
    content[at] = rng.integers(0, 256, count)
    (folder / "fuzz.tar").write_bytes(content)
    shard = index_shard(folder / "fuzz.tar")
    assert (shard.offsets + shard.sizes <= shard.tar_bytes).all()


def test_a_damaged_shard_is_indexed_with_a_warning_that_names_it(tmp_path, caplog):
    write(tmp_path, 8, samples_per_shard=4)
    tar = tmp_path / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    index = write_index(tmp_path)
    assert index.samples[0] == 4
    assert 0 < index.samples[1] < 4
    assert "shard-000001.tar: damaged at byte" in caplog.text
    assert "damage" in json.loads((tmp_path / "index.json").read_text())["shards"][1]


def test_changed_and_missing_shards_are_refused_and_reindexing_helps(tmp_path, monkeypatch, capsys):
    write(tmp_path, 8, samples_per_shard=4, meta={"kept": 1})
    with (tmp_path / "shard-000001.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(ShardError, match=r"shard-000001.*python -m dico_t2i.data"):
        load_index(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data", str(tmp_path)])
    command.main()
    assert "8 samples in 2 shards" in capsys.readouterr().out
    assert load_index(tmp_path).meta == {"kept": 1}
    (tmp_path / "shard-000000.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000000\.tar \(missing"):
        load_index(tmp_path)
    command.main()
    assert len(load_index(tmp_path)) == 4


def test_rebuilding_sees_a_change_that_keeps_the_size(tmp_path, monkeypatch):
    index = write(tmp_path, 2)
    content = bytearray(index.path(0).read_bytes())
    content[600] ^= 255
    index.path(0).write_bytes(content)
    before = index.shard(0).crc32
    assert np.array_equal(write_index(tmp_path).shard(0).crc32, before)
    monkeypatch.setattr(sys, "argv", ["data", str(tmp_path)])
    command.main()
    assert not np.array_equal(load_index(tmp_path).shard(0).crc32, before)


def test_folders_that_are_no_data_sets(tmp_path):
    with pytest.raises(DataError, match="no such data folder"):
        load_index(tmp_path / "absent")
    with pytest.raises(DataError, match="no shards"):
        load_index(tmp_path)
    (tmp_path / "a.tar").write_bytes(os.urandom(5000))
    with pytest.raises(DataError, match=r"no samples.*no tar members"):
        load_index(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 99},
        {"kind": "video"},
        {"shards": [{"name": "../a.tar", "samples": 1, "bytes": 1}]},
        {"shards": [{"name": "a.tar"}]},
        {"meta": 3},
    ],
)
def test_an_index_json_that_cannot_be_used_is_refused(tmp_path, change):
    write(tmp_path)
    path = tmp_path / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=r"index\.json.*index the folder again"):
        load_index(tmp_path)


def test_a_broken_shard_index_is_refused(tmp_path):
    index = write(tmp_path)
    path = tmp_path / "shard-000000.tar.index"
    content = path.read_bytes()
    for broken in (b"", content[:100], content[:-8], content.replace(b'"version":"1"', b'"version":"2"')):
        path.write_bytes(broken)
        with pytest.raises(ShardError, match="index the folder again"):
            index.shard(0)


@pytest.mark.parametrize("change", [{"tar_bytes": 5}, {"sizes": np.zeros((1, 1), np.int64)}])
def test_a_shard_index_that_contradicts_itself_is_refused(tmp_path, change):
    index = write(tmp_path)
    dataclasses.replace(index.shard(0), **change).save(tmp_path / "shard-000000.tar.index")
    with pytest.raises(ShardError, match="inconsistent"):
        index.shard(0)


def test_a_shard_without_samples_has_an_index(tmp_path):
    ShardFile(tmp_path / "empty.tar").commit()
    shard = ShardIndex.load(tmp_path / "empty.tar.index")
    assert (len(shard), shard.extensions, shard.damage) == (0, (), ())
