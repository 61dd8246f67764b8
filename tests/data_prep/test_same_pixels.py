"""What is stored shows what the source shows: every format, crop and importer."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps, features

from data_prep import coco, folder, huggingface, imagenet, webdataset_shards
from dico_t2i.data.decode import IMAGE_EXTENSIONS, decode_image, decode_whole
from tests.data_prep.test_counts import write_tar
from tests.shards import image_bytes, read_samples

TINY = Path(__file__).resolve().parents[3] / "shared" / "data" / "tiny_coco"


def turned(form: str, orientation: int = 6, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image_bytes(1, (48, 32), "PNG"))).save(buffer, form, exif=exif, **options)
    return buffer.getvalue()


def phone() -> bytes:
    """A JPEG of two pictures, turned."""
    return turned("MPO", save_all=True, append_images=[Image.new("RGB", (48, 32), "red")])


SOURCES = {
    "phone.jpg": phone(),
    "jpeg.jpg": turned("JPEG", 5),
    "png.png": turned("PNG", 8),
    "webp.webp": turned("WEBP", 3, lossless=True),
    "tiff.tif": turned("TIFF", 6),
    "gif.gif": image_bytes(2, (48, 32), "GIF"),
    **({"avif.avif": turned("AVIF", 7)} if features.check("avif") else {}),
    "jp2.jp2": image_bytes(4, (48, 32), "JPEG2000"),
}


def from_folder(root: Path, out: list[str]) -> int:
    root.mkdir()
    for name, data in SOURCES.items():
        (root / name).write_bytes(data)
        (root / name).with_suffix(".txt").write_text("a picture")
    return folder.main(["--images", str(root), *out])


def from_coco(root: Path, out: list[str]) -> int:
    from_folder(root, [*out[:1], f"{out[1]}_first", *out[2:]])
    content = {
        "images": [{"id": i, "file_name": name, "width": 1, "height": 1} for i, name in enumerate(SOURCES)],
        "annotations": [{"id": i, "image_id": i, "caption": "a picture"} for i, name in enumerate(SOURCES)],
    }
    (root / "captions.json").write_text(json.dumps(content))
    return coco.main(["--images", str(root), "--captions", str(root / "captions.json"), *out])


def from_classes(root: Path, out: list[str]) -> int:
    (root / "n01440764").mkdir(parents=True)
    for name, data in SOURCES.items():
        (root / "n01440764" / name).write_bytes(data)
    return imagenet.main(["--images", str(root), *out])


def from_tars(root: Path, out: list[str]) -> int:
    root.mkdir()
    members = []
    for name, data in SOURCES.items():
        members += [
            (name, data),
            (f"{Path(name).stem}.json", json.dumps({"captions": ["a picture"], "file_name": name}).encode()),
        ]
    write_tar(root / "0.tar", members)
    return webdataset_shards.main(["--shards", str(root), *out])


def from_parquet(root: Path, out: list[str]) -> int:
    root.mkdir()
    rows = [{"image": {"bytes": data, "path": name}, "text": "a picture"} for name, data in SOURCES.items()]
    pq.write_table(pa.Table.from_pylist(rows), root / "train.parquet")
    return huggingface.main(["--data", str(root), *out])


@pytest.mark.parametrize("crop", ["none", "center", "resize"])
@pytest.mark.parametrize("importer", [from_folder, from_coco, from_classes, from_tars, from_parquet])
def test_stored_pixels_are_those_of_the_source(tmp_path: Path, importer: Any, crop: str) -> None:
    out = ["--out", str(tmp_path / "out"), "--workers", "1", "--crop", crop, "--size", "32", "--quality", "100"]
    assert importer(tmp_path / "in", out) == 0
    samples = read_samples(tmp_path / "out")
    assert len(samples) == len(SOURCES)
    for sample in samples:
        about = json.loads(sample["json"])
        source, stored = SOURCES[about["file_name"]], next(sample[e] for e in IMAGE_EXTENSIONS if e in sample)
        shown = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(source))).convert("RGB")).astype(int)
        assert (about["height"], about["width"]) == shown.shape[:2], about["file_name"]
        if crop == "none":
            assert abs(decode_whole(stored) - shown).max() <= 3, about["file_name"]
            assert len(stored) < 4 * len(source) or "jpg" not in sample
        else:
            wanted = decode_image(source, 32, "center" if crop == "center" else "resize").permute(1, 2, 0).numpy()
            assert abs(decode_whole(stored) - wanted.astype(int)).mean() < 4, about["file_name"]


def test_a_phones_picture_is_kept_byte_for_byte(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out"), "--workers", "1", "--crop", "none"]
    assert from_folder(tmp_path / "in", out) == 0
    kept = {json.loads(s["json"])["file_name"]: s for s in read_samples(tmp_path / "out")}
    for name, extension in (("phone.jpg", "jpg"), ("jpeg.jpg", "jpg"), ("png.png", "png"), ("webp.webp", "webp")):
        assert kept[name][extension] == SOURCES[name]


@pytest.mark.skipif(not TINY.is_dir(), reason="needs shared/data/tiny_coco")
def test_real_images_are_the_same_from_coco_an_imagefolder_and_a_hugging_face_data_set(tmp_path: Path) -> None:
    annotations = TINY / "annotations" / "captions_train2017.json"
    content = json.loads(annotations.read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    captions: dict[str, list[str]] = {}
    for note in content["annotations"]:
        captions.setdefault(names[note["image_id"]], []).append(note["caption"])

    photos = tmp_path / "photos" / "train"
    photos.mkdir(parents=True)
    rows = []
    for name, texts in sorted(captions.items()):
        (photos / name).symlink_to(TINY / "train2017" / name)
        rows.append({"file_name": name, "text": texts})
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "hub").mkdir()
    table = [
        {"image": {"bytes": (photos / row["file_name"]).read_bytes(), "path": row["file_name"]}, "text": row["text"]}
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "hub" / "train-00000-of-00001.parquet", row_group_size=20)

    def found(name: str, main: Any, options: list[str]) -> dict[str, tuple[list[str], bytes]]:
        out = tmp_path / name
        assert main([*options, "--out", str(out), "--crop", "none", "--workers", "1", "--odd-captions"]) == 0
        samples = [(json.loads(sample["json"]), sample["jpg"]) for sample in read_samples(out)]
        return {Path(about["file_name"]).name: (about["captions"], image) for about, image in samples}

    one = found("coco", coco.main, ["--images", str(TINY), "--captions", str(annotations)])
    two = found("folder", folder.main, ["--images", str(tmp_path / "photos")])
    three = found("hf", huggingface.main, ["--data", str(tmp_path / "hub")])
    assert len(one) == 50
    assert one == two == three
    assert sum(len(texts) for texts, _ in one.values()) == 250
