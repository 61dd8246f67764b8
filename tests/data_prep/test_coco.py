"""Packing COCO, on made-up folders with every kind of damage and on fifty real images."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep import coco
from dico_t2i.data.decode import decode_image
from dico_t2i.data.index import load_index
from dico_t2i.data.reader import ShardReader

TINY = Path(__file__).resolve().parents[3] / "shared" / "data" / "tiny_coco"


def _jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((60, 40)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def made_up(tmp_path: Path) -> list[str]:
    """Arguments for six annotated images of which three are whole; 2014's names and layout."""
    folder = tmp_path / "coco" / "val2014"
    folder.mkdir(parents=True)
    names = {i: f"COCO_val2014_{i:012d}.jpg" for i in range(1, 7)}
    for i in (1, 2, 3, 5, 6):
        (folder / names[i]).write_bytes(_jpeg(i))
    (folder / names[5]).write_bytes(_jpeg(5)[:300])  # 4 is missing, 5 is cut, 6 has no caption
    captions = [(i, f"  caption {j}\nof {i}. ") for j in (1, 2) for i in (3, 2, 1, 4, 5)]
    captions += [(99, "of nothing"), (6, " ")]
    annotations = {
        "images": [{"id": i, "file_name": names[i], "width": 60, "height": 40} for i in (3, 1, 2, 4, 5, 6)],
        "annotations": [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(captions)],
    }
    file = tmp_path / "captions_val2014.json"
    file.write_text(json.dumps(annotations))
    out = tmp_path / "out"
    return ["--images", str(folder), "--captions", str(file), "--out", str(out), "--workers", "1"]


def _samples(out: Path) -> list[dict[str, Any]]:
    index = load_index(out)
    reader = ShardReader(index)
    places = [(shard, member) for shard, n in enumerate(index.samples.tolist()) for member in range(n)]
    return [reader.read(shard, member) for shard, member in places]


def test_whole_images_are_packed_and_the_rest_is_listed(
    made_up: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert coco.main([*made_up, "--size", "16", "--samples-per-shard", "2"]) == 0
    samples = _samples(tmp_path / "out")
    assert [json.loads(sample["json"])["image_id"] for sample in samples] == [1, 2, 3]
    assert json.loads(samples[0]["json"]) == {
        "captions": ["caption 1 of 1.", "caption 2 of 1."],
        "image_id": 1,
        "file_name": "COCO_val2014_000000000001.jpg",
        "width": 60,
        "height": 40,
    }
    cropped = decode_image(_jpeg(1), 16, "center").numpy().astype(int)
    stored = np.asarray(Image.open(io.BytesIO(samples[0]["jpg"]))).transpose(2, 0, 1).astype(int)
    assert stored.shape == (3, 16, 16)
    assert abs(stored - cropped).mean() < 8  # JPEG

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["seen"], report["kept"]) == (6, 3)
    assert report["left out"] == {
        "captions of images not in the annotations": 1,
        "missing image files": 1,
        "images without captions": 1,
        "undecodable images": 1,
    }
    assert "000000000005.jpg" in report["examples"]["undecodable images"][0]
    assert "missing image files: 1 (COCO_val2014_000000000004.jpg)" in capsys.readouterr().out
    assert coco.main([*made_up, "--size", "16"]) == 0  # finished already
    with pytest.raises(ValueError, match="a different size"):
        coco.main([*made_up, "--size", "32"])


def test_crop_none_keeps_the_bytes_and_the_parent_will_do(made_up: list[str], tmp_path: Path) -> None:
    made_up[1] = str(tmp_path / "coco")
    assert coco.main([*made_up, "--crop", "none", "--workers", "2"]) == 0
    assert [sample["jpg"] for sample in _samples(tmp_path / "out")] == [_jpeg(1), _jpeg(2), _jpeg(3)]


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (1, "absent", "--images absent: no such folder"),
        (3, "absent.json", "--captions absent.json: no such file"),
        (3, __file__, "not a COCO annotation file"),
    ],
)
def test_bad_arguments_are_refused_before_writing(
    made_up: list[str], tmp_path: Path, position: int, value: str, message: str
) -> None:
    made_up[position] = value
    with pytest.raises(ValueError, match=message):
        coco.main(made_up)
    assert not list(tmp_path.glob("out*"))


def test_no_match_and_no_captions_say_what_was_looked_for(made_up: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    file = Path(made_up[3])
    with pytest.raises(ValueError, match=r"none of the 6 .* such as COCO_val2014_000000000003.jpg"):
        coco.main(["--images", str(tmp_path / "empty"), *made_up[2:]])
    content = json.loads(file.read_text())
    for item in content["annotations"]:
        del item["caption"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has no captions"):
        coco.main(made_up)
    assert not list(tmp_path.glob("out*"))


def test_nothing_existing_is_overwritten(made_up: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(ValueError, match="other files"):
        coco.main(made_up)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.skipif(not TINY.is_dir(), reason="needs shared/data/tiny_coco")
def test_real_images(tmp_path: Path) -> None:
    captions = TINY / "annotations" / "captions_train2017.json"
    out = tmp_path / "out"
    arguments = ["--images", str(TINY), "--captions", str(captions), "--out", str(out), "--crop", "none"]
    assert coco.main([*arguments, "--workers", "1"]) == 0
    samples = _samples(out)
    assert len(samples) == 50
    about = [json.loads(sample["json"]) for sample in samples]
    assert sum(len(item["captions"]) for item in about) == 250
    for sample, item in zip(samples, about, strict=True):
        assert sample["jpg"] == (TINY / "train2017" / item["file_name"]).read_bytes()
        assert Image.open(io.BytesIO(sample["jpg"])).size == (item["width"], item["height"])
    report = json.loads((out / "report.json").read_text())
    assert (report["seen"], report["kept"], report["left out"]) == (50, 50, {})
    assert Image.open(out / "report.png").size > (1000, 300)
    assert Image.open(out / "samples.png").size > (1000, 800)
