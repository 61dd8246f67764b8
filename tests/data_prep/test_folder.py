"""Folders and tables of captions: what is taken, what is refused, restarts, processes; every kind of odd image."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep import folder
from dico_t2i.data.decode import decode_image
from tests.shards import image_bytes, read_samples, tar_bytes

COUNT = 7


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Seven images in two folders, each with a text file."""
    root = tmp_path / "images"
    for i in range(COUNT):
        path = root / ("b" if i % 2 else "a") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(i))
        path.with_suffix(".txt").write_text(f"picture number {i}\nthe same in other words, {i}\n")
    return root


def prepare(images: Path, out: str = "out", *options: str) -> int:
    wanted = ["--images", str(images), "--out", str(images.parent / out), "--samples-per-shard", "3"]
    return folder.main([*wanted, *(() if "--workers" in options else ("--workers", "1")), *options])


def report(images: Path, out: str = "out") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((images.parent / out / "report.json").read_text())
    return content


def about(images: Path, out: str = "out") -> list[dict[str, Any]]:
    return [json.loads(sample["json"]) for sample in read_samples(images.parent / out)]


def test_text_beside_images(images: Path) -> None:
    assert prepare(images, "out", "--size", "16") == 0
    found = about(images)
    names = ["a/0.jpg", "a/2.jpg", "a/4.jpg", "a/6.jpg", "b/1.jpg", "b/3.jpg", "b/5.jpg"]
    assert [item["file_name"] for item in found] == names
    assert found[1] == {
        "captions": ["picture number 2", "the same in other words, 2"],
        "file_name": "a/2.jpg",
        "width": 60,
        "height": 40,
    }
    sample = read_samples(images.parent / "out")[1]
    stored = np.asarray(Image.open(io.BytesIO(sample["jpg"]))).transpose(2, 0, 1).astype(int)
    assert abs(stored - decode_image(image_bytes(2), 16, "center").numpy().astype(int)).mean() < 8
    assert (report(images)["seen"], report(images)["kept"]) == (COUNT, COUNT)


def write_table(images: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    table = images.parent / f"table.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=5)
    elif kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return table


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables(images: Path, kind: str) -> None:
    rows = [
        {
            "path": f"{'b' if i % 2 else 'a'}/{i}.jpg",
            "caption": f'"number" {i},\nor so',
            "other": "ein Bild",
            "score": i / 2,
        }
        for i in range(COUNT)
    ]
    table = write_table(images, kind, rows)
    assert prepare(images, "out", "--table", str(table), "--caption-columns", "caption", "other") == 0
    found = about(images)
    assert [item["captions"] for item in found] == [[f'"number" {i}, or so', "ein Bild"] for i in range(COUNT)]
    assert [float(item["score"]) for item in found] == [i / 2 for i in range(COUNT)]
    # filters; the path and caption columns are found by their usual names
    assert prepare(images, "fine", "--table", str(table), "--min-field", "score=1.5") == 0
    assert [float(item["score"]) for item in about(images, "fine")] == [1.5, 2, 2.5, 3]
    assert report(images, "fine")["left out"] == {"score below 1.5": 3}


def test_images_inside_a_table(images: Path) -> None:
    rows = [{"image": {"bytes": image_bytes(i), "path": f"{i}.jpg"}, "text": f"number {i}"} for i in range(3)]
    table = write_table(images, "parquet", rows)
    assert prepare(images, "out", "--table", str(table), "--crop", "none") == 0
    assert [sample["jpg"] for sample in read_samples(images.parent / "out")] == [image_bytes(i) for i in range(3)]


def test_hostile_and_broken_rows_are_counted(images: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(image_bytes(99))
    os.mkfifo(images / "pipe.jpg")  # reading it would wait for ever
    (images / "link.jpg").symlink_to("/dev/zero")
    paths = ["a/0.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "a/../../secret.jpg", "pipe.jpg", "link.jpg"]
    paths += ["missing.jpg", "nul\0.jpg", "", "x" * 5000, "a"]
    lines = [json.dumps({"path": path, "caption": "a dog"}) for path in paths]
    lines += [
        "{",
        "[1]",
        "[" * 100_000,
        json.dumps({"caption": "a dog"}),
        json.dumps({"path": "a/2.jpg", "caption": 3}),
    ]
    table = tmp_path / "table.jsonl"
    table.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe{}\n")
    assert prepare(images, "out", "--table", str(table)) == 0
    assert [item["file_name"] for item in about(images)] == ["a/0.jpg"]
    assert report(images)["left out"] == {
        "paths outside --images": 3,
        "not image files": 3,
        "missing image files": 1,
        "unreadable image files": 2,
        "rows without an image": 2,
        "unreadable rows": 4,
        "images without captions": 1,
    }


def oddities() -> dict[str, bytes]:
    """Images of all sorts, by file name."""
    grey16 = io.BytesIO()
    Image.fromarray((np.arange(1600).reshape(40, 40) * 40).astype(np.uint16)).save(grey16, "PNG")
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green")]
    animated = io.BytesIO()
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    cmyk = io.BytesIO()
    Image.new("CMYK", (40, 40), (255, 0, 0, 0)).save(cmyk, "JPEG")
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(image_bytes(1, (60, 40)))).save(turned, "JPEG", exif=exif)
    transparent = io.BytesIO()
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(transparent, "PNG")
    return {
        "grey16.png": grey16.getvalue(),
        "animated.gif": animated.getvalue(),
        "cmyk.jpg": cmyk.getvalue(),
        "turned.jpg": turned.getvalue(),
        "transparent.png": transparent.getvalue(),
        "really_png.jpg": image_bytes(2, form="PNG"),
    }


@pytest.mark.parametrize("crop", ["center", "none"])
def test_odd_images_are_normalised(tmp_path: Path, crop: str) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for name, data in oddities().items():
        (root / name).write_bytes(data)
        (root / name).with_suffix(".txt").write_text("a thing")
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    targa = image_bytes(3, form="TGA")
    for name, data in {"bomb.png": bomb.getvalue(), "targa.jpg": targa, "text.jpg": b"hello", "empty.png": b""}.items():
        (root / name).write_bytes(data)
        (root / name).with_suffix(".txt").write_text("a thing")
    assert prepare(root, "out", "--size", "8", "--crop", crop) == 0
    found = {json.loads(sample["json"])["file_name"]: sample for sample in read_samples(tmp_path / "out")}
    assert set(found) == set(oddities())
    assert report(root)["left out"] == {"undecodable images": 3, f"more than {1 << 27} pixels": 1}
    turned = json.loads(found["turned.jpg"]["json"])
    assert (turned["width"], turned["height"]) == (40, 60)
    if crop == "none":
        assert found["really_png.jpg"]["png"] == image_bytes(2, form="PNG")  # the content says what it is
        assert found["cmyk.jpg"]["jpg"] == oddities()["cmyk.jpg"]
        first = np.asarray(Image.open(io.BytesIO(found["animated.gif"]["png"])).convert("RGB"))
        assert (first == (255, 0, 0)).all()
    else:
        pixels = {name: np.asarray(Image.open(io.BytesIO(sample["jpg"]))) for name, sample in found.items()}
        assert all(image.shape == (8, 8, 3) for image in pixels.values())
        assert pixels["transparent.png"].min() > 250
        assert abs(pixels["cmyk.jpg"].astype(int) - (0, 255, 255)).max() < 20
        assert pixels["grey16.png"][0].mean() < 50 < 180 < pixels["grey16.png"][-1].mean()


def test_captions_in_other_encodings(images: Path) -> None:
    (images / "a" / "0.txt").write_bytes("Straße".encode("utf-16"))
    (images / "a" / "2.txt").write_bytes("Straße".encode("cp1252"))
    (images / "a" / "4.txt").unlink()
    (images / "a" / "6.txt").write_bytes(b"\n?\n\x00\n")
    assert prepare(images) == 0
    assert about(images)[0]["captions"] == ["Straße"]
    assert report(images)["left out"] == {
        "text that is not utf-8": 1,
        "images without captions": 1,
        "captions empty": 2,
        "captions without letters": 1,
        "images without a caption left": 1,
    }
    assert prepare(images, "western", "--encoding", "cp1252") == 0
    assert [item["captions"] for item in about(images, "western")][1] == ["Straße"]


def test_bytes_depend_on_the_input_alone(images: Path) -> None:
    assert prepare(images) == 0
    whole = tar_bytes(images.parent / "out")
    assert len(whole) == 3
    assert prepare(images, "two", "--workers", "2") == 0
    assert tar_bytes(images.parent / "two") == whole
    assert prepare(images, "parts", "--part", "1/2") == 0
    assert list(tar_bytes(images.parent / "parts")) == ["shard-000001.tar"]
    assert not (images.parent / "parts" / "index.json").exists()
    assert prepare(images, "parts", "--part", "0/2") == 0
    assert tar_bytes(images.parent / "parts") == whole
    assert report(images, "parts") == report(images)


def test_restart_makes_what_is_missing(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = images.parent / "out"
    assert prepare(images) == 0
    whole, kept = tar_bytes(out), (out / "shard-000000.tar").stat()
    (out / "shard-000001.tar").unlink()
    (out / ".shard-000001.tar.dead.part").write_bytes(b"of a killed run")
    (out / "index.json").unlink()
    assert prepare(images) == 0
    assert tar_bytes(out) == whole
    assert (out / "shard-000000.tar").stat() == kept
    assert not list(out.glob(".*"))
    capsys.readouterr()
    assert prepare(images) == 0
    assert "already contains" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a different crop"):
        prepare(images, "out", "--crop", "none")


def test_a_source_that_changed_is_refused(images: Path) -> None:
    out = images.parent / "out"
    assert prepare(images) == 0
    (out / "shard-000002.tar").unlink()
    (images / "a" / "1.jpg").write_bytes(image_bytes(11))  # moves all that follow
    with pytest.raises(ValueError, match="the source has changed"):
        prepare(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--table", "absent.csv"], "--table absent.csv: no such file"),
        (["--table", __file__], "not a .csv, .tsv, .jsonl or .parquet file"),
        (
            ["--table", "TABLE", "--path-column", "where"],
            "--path-column: the table has no where; its columns are path, words",
        ),
        (["--table", "TABLE"], "--caption-columns: the table has no captions, caption, text"),
        (["--quality", "0"], "--quality: 1 to 100"),
    ],
)
def test_bad_arguments_are_refused_before_writing(images: Path, options: list[str], message: str) -> None:
    table = write_table(images, "csv", [{"path": "a/0.jpg", "words": "x"}])
    with pytest.raises(ValueError, match=message):
        prepare(images, "out", *(str(table) if option == "TABLE" else option for option in options))
    assert not (images.parent / "out").exists()


def test_nothing_left_is_an_error(images: Path) -> None:
    with pytest.raises(ValueError, match=r"none of 7 images is left; smaller side below 1000: 7"):
        prepare(images, "out", "--min-side", "1000")
