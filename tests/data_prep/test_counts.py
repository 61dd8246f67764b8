"""What is seen is kept or counted by reason, to the last file, row and sample; by every importer."""

import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import features

from data_prep import coco, folder, huggingface, imagenet, webdataset_shards
from dico_t2i.data.decode import decode_whole
from dico_t2i.data.errors import DataError, ShardError
from dico_t2i.data.index import load_index
from tests.shards import image_bytes, read_samples

FORMS = {"jpg": "JPEG", "JPEG": "JPEG", "jfif": "JPEG", "jpe": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}
FORMS |= {"bmp": "BMP", "tif": "TIFF", "tiff": "TIFF", "jp2": "JPEG2000"}
FORMS |= {"avif": "AVIF"} if features.check("avif") else {}
UNREAD = ("heic", "jxl", "svg", "mp4", "json")
ODD_CAPTIONS: list[Any] = ["a dog", ["a cat", None, 3], None, 7, {"a": 1}, "", "  ", [], float("nan"), "\0"]


def picture(rng: random.Random, number: int) -> tuple[str, bytes]:
    """The extension and bytes of an image, one in four of them of no use."""
    extension = rng.choice([*FORMS])
    data = image_bytes(number, (20, 14), FORMS[extension])
    return extension, rng.choice([data, data, data, rng.choice([b"", data[:40], b"hello"])])


def report(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "report.json").read_text())
    return content


def check_sum(out: Path, seen: int, printed: str) -> None:
    """Nothing is missing in the report, on the screen and in the shards."""
    found = report(out)
    entries = {name: n for name, n in found["left out"].items() if not name.startswith(("captions", "members"))}
    assert found["seen"] == found["kept"] + sum(entries.values()) == seen, found["left out"]
    assert f"{found['kept']} of {seen} samples" in printed
    assert all(f"{name}: {n}" in printed for name, n in entries.items())
    assert len(read_samples(out)) == found["kept"]


def in_folder(rng: random.Random, root: Path) -> tuple[list[str], int]:
    """Images in folders and linked folders, with and without text, beside files of other kinds."""
    seen = 0
    for number in range(14):
        extension, data = picture(rng, number)
        path = root / rng.choice(["", "a", "a/b", "c d"]) / f"{number}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if rng.random() < 0.8:
            path.with_suffix(".txt").write_bytes(rng.choice([b"a dog", b"a\xff", b"\n", "ü".encode("utf-16")]))
        seen += 1
    (root / "keep.png").write_bytes(image_bytes(1, (20, 14), "PNG"))
    (root / "keep.txt").write_text("a dog")
    (root / f"stray.{rng.choice(UNREAD)}").write_bytes(b"x")
    (root / "orphan.txt").write_text("of no image")
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked.jpg").write_bytes(image_bytes(3))
    (root / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(elsewhere)
    (root / "gone.jpg").symlink_to("nowhere.jpg")
    return ["--images", str(root)], seen + 6


def in_imagefolder(rng: random.Random, root: Path) -> tuple[list[str], int]:
    """Metadata files in folders, rows that name nothing, images that no row names."""
    seen = 0
    for name in ("train", "test/deep"):
        (root / name).mkdir(parents=True)
        rows = []
        for number in range(6):
            extension, data = picture(rng, number)
            (root / name / f"{number}.{extension}").write_bytes(data)
            seen += 1
            if rng.random() < 0.7:
                rows.append({"file_name": f"{number}.{extension}", "text": rng.choice(ODD_CAPTIONS)})
        (root / name / "keep.png").write_bytes(image_bytes(1, (20, 14), "PNG"))
        rows += [{"file_name": "keep.png", "text": ["one", "two"]}, {"file_name": "gone.jpg", "text": "x"}]
        lines = [json.dumps(row) for row in rows] + ["{", ""]
        (root / name / "metadata.jsonl").write_text("\n".join(lines))
        seen += 3
    return ["--images", str(root)], seen


def in_table(rng: random.Random, root: Path) -> tuple[list[str], int]:
    root.mkdir()
    rows = []
    for number in range(12):
        extension, data = picture(rng, number)
        (root / f"{number}.{extension}").write_bytes(data)
        rows.append(json.dumps({"path": f"{number}.{extension}", "caption": rng.choice(ODD_CAPTIONS)}))
    (root / "keep.png").write_bytes(image_bytes(1, (20, 14), "PNG"))
    more = [{"path": "keep.png", "caption": "a dog"}, {"path": "../x.jpg"}, {"path": None}, {"path": "gone.jpg"}]
    rows += [*map(json.dumps, more), "[", "3"]
    rng.shuffle(rows)
    table = root.parent / "table.jsonl"
    table.write_text("\n".join(rows) + "\n\n")
    return ["--images", str(root), "--table", str(table)], 18


def in_coco(rng: random.Random, root: Path) -> tuple[list[str], int]:
    (root / "val").mkdir(parents=True)
    images, notes = [], []
    for number in range(12):
        extension, data = picture(rng, number)
        name = f"{number}.{extension}"
        if rng.random() < 0.8:
            (root / "val" / name).write_bytes(data)
        images.append({"id": number, "file_name": f"val/{name}", "width": None})
        notes += [{"id": 2 * number + i, "image_id": number, "caption": rng.choice(ODD_CAPTIONS)} for i in range(2)]
    (root / "val" / "keep.png").write_bytes(image_bytes(1, (20, 14), "PNG"))
    (root / "val" / "unannotated.jpg").write_bytes(b"")
    images.append({"id": 99, "file_name": "keep.png"})
    notes += [{"id": 998, "image_id": 99, "caption": "a dog"}, {"id": 999, "image_id": 77, "caption": "of nothing"}]
    file = root.parent / "captions.json"
    file.write_text(json.dumps({"images": images, "annotations": notes}))
    return ["--images", str(root), "--captions", str(file)], 14


def in_classes(rng: random.Random, root: Path) -> tuple[list[str], int]:
    for number in range(12):
        extension, data = picture(rng, number)
        path = root / rng.choice(["n01440764", "n01443537/deeper"]) / f"x.{number % 3}.{number}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (root / "n02102040").mkdir()
    (root / "n02102040" / "keep.png").write_bytes(image_bytes(1, (20, 14), "PNG"))
    (root / "n02102040" / f"film.{rng.choice(UNREAD)}").write_bytes(b"")
    (root / "stray.jpg").write_bytes(b"")
    return ["--images", str(root)], 15


def in_tars(rng: random.Random, root: Path) -> tuple[list[str], int]:
    """Samples, of which some have links, devices or names in place of members."""
    root.mkdir()
    seen = 0
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for number in range(8):
                extension, data = picture(rng, number)
                key = rng.choice(
                    [f"{shard}{number}", f"{shard}{number}", f"img.{shard}.{number}", f"/abs/{shard}{number}"]
                )
                text = json.dumps({"captions": rng.choice(ODD_CAPTIONS)}).encode()
                kind = rng.choice([tarfile.REGTYPE] * 4 + [tarfile.LNKTYPE, tarfile.SYMTYPE])
                for name, content in ((f"{key}.{extension.lower()}", data), (f"{key}.json", text)):
                    info = tarfile.TarInfo(name)
                    info.type, info.linkname = kind, "elsewhere"
                    info.size = len(content) if kind == tarfile.REGTYPE else 0
                    tar.addfile(info, io.BytesIO(content))
                seen += 1
            for name, content in (("keep.png", image_bytes(1, (20, 14), "PNG")), ("keep.txt", b"a dog")):
                info = tarfile.TarInfo(f"{shard}{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return ["--shards", str(root)], seen + 2


def in_parquet(rng: random.Random, root: Path) -> tuple[list[str], int]:
    root.mkdir()
    rows: list[dict[str, Any]] = []
    for number in range(12):
        extension, data = picture(rng, number)
        image = rng.choice([{"bytes": data, "path": f"{number}.{extension}"}, {"bytes": None, "path": "gone"}, None])
        rows.append({"image": image, "text": rng.choice(["a dog", None, "", "www.x.org"])})
    rows.append({"image": {"bytes": image_bytes(1), "path": "keep.jpg"}, "text": "a dog"})
    pq.write_table(pa.Table.from_pylist(rows), root / "train-00000-of-00001.parquet", row_group_size=5)
    return ["--data", str(root)], 13


IMPORTERS: dict[str, tuple[Callable[[list[str]], int], Callable[[random.Random, Path], tuple[list[str], int]]]] = {
    "folder": (folder.main, in_folder),
    "imagefolder": (folder.main, in_imagefolder),
    "table": (folder.main, in_table),
    "coco": (coco.main, in_coco),
    "imagenet": (imagenet.main, in_classes),
    "webdataset": (webdataset_shards.main, in_tars),
    "huggingface": (huggingface.main, in_parquet),
}


@pytest.mark.filterwarnings("ignore")  # of Pillow, on odd images
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("importer", [*IMPORTERS])
def test_all_that_is_seen_is_kept_or_counted(
    tmp_path: Path, importer: str, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    main, make = IMPORTERS[importer]
    options, seen = make(random.Random(f"{importer} {seed}"), tmp_path / "source")
    crop = ["none", "center"][seed % 2]
    common = ["--out", str(tmp_path / "out"), "--workers", "1", "--crop", crop, "--size", "16"]
    assert main([*options, *common, *([] if importer == "webdataset" else ["--samples-per-shard", "5"])]) == 0
    check_sum(tmp_path / "out", seen, capsys.readouterr().out)


def test_what_pillow_reads_is_read_and_the_rest_is_counted_by_extension(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for extension in (*FORMS, *UNREAD):
        data = image_bytes(1, (20, 14), FORMS.get(extension, "JPEG"))
        (root / f"{extension}.{extension}").write_bytes(data)
        (root / f"{extension}.txt").write_text("a dog")
    assert folder.main(["--images", str(root), "--out", str(tmp_path / "out"), "--crop", "none", "--workers", "1"]) == 0
    names = {json.loads(sample["json"])["file_name"] for sample in read_samples(tmp_path / "out")}
    assert names == {f"{extension}.{extension}" for extension in FORMS}
    unread = {f"files that are not read (.{extension})": 1 for extension in UNREAD}
    assert report(tmp_path / "out")["left out"] == unread | {"files that are not read (.txt)": len(UNREAD)}


def write_tar(path: Path, members: list[tuple[str, bytes]], links: tuple[tuple[str, str], ...] = ()) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, target
            tar.addfile(info)


def pairs(*keys: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.{kind}", data) for key in keys for kind, data in (("jpg", image_bytes(1)), ("txt", b"a dog"))]


@pytest.mark.parametrize("keys", [("img.0", "img.1", "img.2"), ("a.b.c", "a.b.d", "a.e"), ("x/v1.0", "x/v1.1", "y")])
def test_keys_with_dots_are_samples_of_their_own(tmp_path: Path, keys: tuple[str, ...]) -> None:
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "0.tar", pairs(*keys))
    shard = load_index(tmp_path / "in").shard(0)
    assert [shard.key(member) for member in range(len(shard))] == list(keys)  # trained on as they are
    options = ["--shards", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert webdataset_shards.main(options) == 0
    folders = [key.rpartition("/") for key in keys]
    expected = [f"{folder}{slash}{base.replace('.', '%2E')}" for folder, slash, base in folders]
    assert [sample["__key__"] for sample in read_samples(tmp_path / "out")] == expected


def test_a_dot_in_an_extension_is_webdatasets(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [*pairs("a"), ("a.mask.png", b"m"), ("a.blip.txt", b"b"), ("b.seg.png", b"s")])
    shard = load_index(tmp_path).shard(0)
    assert [shard.key(member) for member in range(len(shard))] == ["a", "b"]
    assert shard.extensions == ("blip.txt", "jpg", "mask.png", "seg.png", "txt")


def test_linked_members_are_counted_as_the_sample_they_would_be(tmp_path: Path) -> None:
    links = (("d.jpg", "a.jpg"), ("d.txt", "a.txt"), ("e.txt", "a.txt"))
    write_tar(tmp_path / "0.tar", [*pairs("a", "b", "c"), ("e.jpg", image_bytes(2))], links)
    options = ["--shards", str(tmp_path / "0.tar"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert webdataset_shards.main(options) == 0
    found = report(tmp_path / "out")
    assert (found["seen"], found["kept"]) == (5, 3)
    hard = "hard links (tar them with --hard-dereference)"
    assert found["left out"] == {hard: 1, "images without captions": 1, f"members left out: {hard}": 1}


def test_tars_of_no_use_name_the_cause(tmp_path: Path) -> None:
    (tmp_path / "absolute").mkdir()
    write_tar(tmp_path / "absolute" / "0.tar", pairs("/data/a", "/data/b"))
    with pytest.raises(DataError, match=r"4 members left out: absolute names .*, such as '/data/a\.jpg'"):
        load_index(tmp_path / "absolute")
    for name, mode in (("gzip", "w:gz"), ("bzip2", "w:bz2"), ("xz", "w:xz")):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "0.tar", mode) as tar:  # type: ignore[call-overload]
            tar.addfile(tarfile.TarInfo("a.jpg"))
        with pytest.raises(ShardError, match=rf"0.tar: is compressed \({name}\); unpack it"):
            load_index(tmp_path / name)
        os.rename(tmp_path / name / "0.tar", tmp_path / name / "0.tar.gz")  # noqa: PTH104
        with pytest.raises(DataError, match=r"no shards .*1 are compressed, such as 0.tar.gz: unpack them"):
            load_index(tmp_path / name)


def test_compressed_tars_beside_others_are_counted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "0.tar", pairs("a"))
    for name in ("1.tar.gz", "2.tgz"):
        (tmp_path / "in" / name).write_bytes(b"")
    options = ["--shards", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert webdataset_shards.main(options) == 0
    assert report(tmp_path / "out")["left out"] == {"compressed archives (unpack them)": 2}
    assert report(tmp_path / "out")["seen"] == 3


def test_a_compressed_tar_of_an_import_is_told_and_left_to_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "0.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    options = ["--shards", str(tmp_path / "0.tar"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert webdataset_shards.main(options) == 1
    assert "0.tar: is compressed (gzip); unpack it" in capsys.readouterr().out


@pytest.mark.parametrize("form", sorted(set(FORMS.values())))
@pytest.mark.parametrize("member", ["jfif", "tif", "gif"])
def test_the_loader_reads_members_of_every_extension(tmp_path: Path, form: str, member: str) -> None:
    data = image_bytes(1, (20, 14), form)
    write_tar(tmp_path / "0.tar", [(f"a.{member}", data), ("a.txt", b"a dog")])
    (sample,) = read_samples(tmp_path)
    assert (decode_whole(sample[member]) == decode_whole(data)).all()
