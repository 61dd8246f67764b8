"""Captions from templates, classes from columns, held-out samples, and backgrounds of transparent images."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.importing.conditions import Templates
from dico_t2i.data.index import load_index
from tests.data_prep.test_counts import report
from tests.data_prep.test_huggingface import parquet, prepare

CLASSES = ["horse", "airplane", "unicorn"]


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {"img": {"bytes": png(i), "path": None}, "label": i % 3, "class": CLASSES[i % 3], "style": "ab"[i // 3 % 2]}
        for i in range(count)
    ]


def png(seed: int, alpha: int = 255) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 4)).astype(np.uint8)
    pixels[..., 3] = 255
    pixels[:4, :, 3] = alpha
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("RGBA" if alpha < 255 else "RGB").save(buffer, "PNG")
    return buffer.getvalue()


def about(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [json.loads(sample["json"]) for sample in samples]


def test_class_names_become_captions_and_class_numbers_labels(tmp_path: Path) -> None:
    parquet(tmp_path / "set" / "train.parquet", rows(6))
    texts = ["a photo of a {class}", "{class} in style {style}"]
    options = ("--label-column", "label", "--templates", *texts)
    samples = prepare(tmp_path / "set", tmp_path / "out", *options)
    assert [sample["cls"] for sample in samples] == [b"0", b"1", b"2"] * 2
    captions = [entry["captions"] for entry in about(samples)]
    assert captions[0] == ["a photo of a horse", "horse in style a"]
    assert [captions[1][0], captions[2][0]] == ["a photo of an airplane", "a photo of a unicorn"]
    meta = load_index(tmp_path / "out").meta
    assert (meta["templates"], meta["label"], meta["captions"]) == (texts, "label", [])
    with pytest.raises(ValueError, match="different templates"):
        prepare(tmp_path / "set", tmp_path / "out", "--label-column", "label", "--templates", "a {class}")
    alone = prepare(tmp_path / "set", tmp_path / "classes", "--label-column", "label")
    assert "captions" not in about(alone)[0]


def test_templates_are_drawn_by_a_seed() -> None:
    texts = tuple(f"{n} {{class}}" for n in range(5))
    drawn = [Templates(texts, 2, seed=1).captions(number, {"class": "cat"}) for number in range(40)]
    assert drawn == [Templates(texts, 2, seed=1).captions(number, {"class": "cat"}) for number in range(40)]
    assert drawn != [Templates(texts, 2, seed=2).captions(number, {"class": "cat"}) for number in range(40)]
    assert {len(captions) for captions in drawn} == {2}
    assert {text for captions in drawn for text in captions} == {f"{n} cat" for n in range(5)}
    assert Templates(("a {x}", "a {y}")).captions(0, {"x": None, "y": "egg"}) == ["an egg"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--templates", "a photo of a {name}"), r"the table has no name; the columns are img, label, class, style"),
        (("--templates", "a photo"), "it names no column in braces"),
        (("--templates", "a {photo"), "--templates 'a {photo'"),
        (("--label-column", "number"), "--label-column: the table has no number"),
        (("--label-column", "label", "--held-out"), "they need --hold-out"),
        (("--label-column", "label", "--hold-out", "class=0"), "must be above 0"),
    ],
)
def test_wrong_options_are_told_before_anything_is_written(tmp_path: Path, options: Any, message: str) -> None:
    parquet(tmp_path / "set" / "train.parquet", rows(2))
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "set", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_rows_without_a_class_are_counted(tmp_path: Path) -> None:
    content = rows(3)
    content[1]["label"] = -1
    parquet(tmp_path / "set" / "train.parquet", content)
    assert len(prepare(tmp_path / "set", tmp_path / "out", "--label-column", "label")) == 2
    assert report(tmp_path / "out")["left out"] == {"rows without a class number": 1}


def test_held_out_pairs_have_a_partner_in_training(tmp_path: Path) -> None:
    content = [
        {"img": {"bytes": png(0), "path": None}, "code": f"c{i}", "style": style} for i in range(40) for style in "ab"
    ]
    parquet(tmp_path / "set" / "train.parquet", content)
    split = ("--templates", "{code} {style}", "--hold-out", "code=0.5", "--hold-out-one-of", "style=a,b")
    kept = about(prepare(tmp_path / "set", tmp_path / "kept", *split))
    held = about(prepare(tmp_path / "set", tmp_path / "held", *split, "--held-out"))
    pairs = {(entry["code"], entry["style"]) for entry in held}
    assert len(pairs) == len(held) == 80 - len(kept)
    assert pairs.isdisjoint((entry["code"], entry["style"]) for entry in kept)
    assert {code for code, _ in pairs} <= {entry["code"] for entry in kept}
    assert {style for _, style in pairs} == {"a", "b"}
    assert 10 < len(pairs) < 30
    assert load_index(tmp_path / "held").meta["filters"]["held_out"] is True


def test_transparent_images_get_a_background(tmp_path: Path) -> None:
    content = [{"img": {"bytes": png(i, alpha=0 if i < 3 else 255), "path": None}, "label": i} for i in range(4)]
    parquet(tmp_path / "set" / "train.parquet", content)
    options = ("--label-column", "label", "--background")
    white, grey, drawn = (prepare(tmp_path / "set", tmp_path / n, *options, n) for n in ("white", "#808080", "random"))
    for samples, colours in ((white, {(255, 255, 255)}), (grey, {(128, 128, 128)})):
        assert {tuple(entry["background"]) for entry in about(samples)[:3]} == colours
    colours = [tuple(entry["background"]) for entry in about(drawn)[:3]]
    assert len(set(colours)) == 3
    for sample, colour in zip(drawn, colours, strict=False):
        pixels = np.asarray(Image.open(io.BytesIO(sample["png"])))
        assert (pixels[:4] == colour).all()
        assert (pixels[4:] == np.asarray(Image.open(io.BytesIO(png(int(sample["cls"])))))[4:]).all()
    assert drawn[3]["png"] == png(3)  # it has no transparency
    assert "background" not in about(drawn)[3]
    assert load_index(tmp_path / "random").meta["background"] == "random"
