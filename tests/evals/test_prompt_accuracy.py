"""The reader of shapes and the accuracy of samples against their prompts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data_prep.shapes_scene import Object, Scene, held_out_prompts, is_held_out, parse, random_scene, render
from evals import prompt_accuracy
from evals.prompt_accuracy import accuracy, reader_accuracy
from evals.shapes.reader import Reading, read

SCENE = Scene("white", (Object("large", "red", "circle", "left"),))


@pytest.mark.parametrize(("size", "n"), [(16, 600), (32, 200), (64, 50)])
def test_reader_reads_real_renderings(size: int, n: int) -> None:
    result = reader_accuracy(n, size, seed=5)
    assert result["n"] == n
    assert min(result["colour"], result["background"]) >= 0.99
    assert min(result["shape"], result["place"], result["size"]) >= 0.97


def test_reader_stands_noise() -> None:
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, 0.0, held_out=False) for _ in range(200)]
    images = np.stack([render(scene, 16, rng) for scene in scenes]).astype(float)
    noisy = np.clip(images + rng.normal(0, 10, images.shape), 0, 255).astype(np.uint8)
    assert accuracy(noisy, scenes)["all"] >= 0.97


def test_reader_sees_nothing_in_blank_and_random_images() -> None:
    assert read(np.full((16, 16, 3), 120, dtype=np.uint8)) == Reading("grey")
    rng = np.random.default_rng(0)
    assert all(read(image).shape is None for image in rng.integers(0, 256, (50, 16, 16, 3)).astype(np.uint8))


@pytest.mark.parametrize(
    ("name", "value"), [("size", "small"), ("colour", "orange"), ("shape", "square"), ("place", "centre")]
)
def test_one_wrong_property_counts_as_that_one(name: str, value: str) -> None:
    asked = Scene("white", (replace(SCENE.objects[0], **{name: value}),))
    image = render(SCENE, 16, np.random.default_rng(0))
    result = accuracy(np.stack([image, image]), [SCENE, asked])
    expected = dict.fromkeys(prompt_accuracy.PROPERTIES, 1.0) | {name: 0.5, "all": 0.5, "n": 2}
    assert result == expected


def test_two_objects_are_no_shape_of_one_object() -> None:
    rng = np.random.default_rng(0)
    pairs = [random_scene(rng, 1.0, held_out=False) for _ in range(200)]
    asked = [Scene(pair.background, pair.objects[:1]) for pair in pairs]
    assert accuracy(np.stack([render(pair, 16, rng) for pair in pairs]), asked)["all"] < 0.05


def test_numbers_must_agree() -> None:
    with pytest.raises(ValueError, match="1 images for 0 scenes"):
        accuracy(np.zeros((1, 16, 16, 3), dtype=np.uint8), [])


def _save(folder: Path, name: str, scene: Scene, prompt: str | None, size: int = 16) -> None:
    info = PngInfo()
    if prompt is not None:
        info.add_text("prompt", prompt)
    image = Image.fromarray(render(scene, size, np.random.default_rng(0)))
    image.save(folder / name, pnginfo=info)


def test_script_scores_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, (prompt, scene) in enumerate(held_out_prompts(10, seed=0)):
        shown = scene if i else replace(scene, background="grey" if scene.background != "grey" else "black")
        _save(tmp_path, f"{i:06d}.png", shown, prompt)
    _save(tmp_path, "000010.png", SCENE, "a dog")
    _save(tmp_path, "grid.png", SCENE, None, size=64)
    assert prompt_accuracy.main(["--images", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "prompt_accuracy.json").read_text())
    assert (result["samples"]["n"], result["skipped"]) == (10, 1)
    assert result["samples"]["background"] == 0.9
    assert result["samples"]["colour"] == 1.0
    assert result["renderings"]["n"] == 500
    printed = capsys.readouterr().out
    assert "90.0%" in printed
    assert "a dog" in printed


def test_prompts_may_lie_beside_the_images(tmp_path: Path) -> None:
    prompt, scene = held_out_prompts(1, seed=0)[0]
    _save(tmp_path, "a.png", scene, None)
    with pytest.raises(ValueError, match="none of 1 PNG files has a text entry"):
        prompt_accuracy.load_samples(tmp_path)
    (tmp_path / "prompts.json").write_text(json.dumps([prompt, prompt]))
    with pytest.raises(ValueError, match="expected a list of 1 prompts"):
        prompt_accuracy.load_samples(tmp_path)
    (tmp_path / "prompts.json").write_text(json.dumps([prompt]))
    images, prompts = prompt_accuracy.load_samples(tmp_path)
    assert images.shape == (1, 16, 16, 3)
    assert prompts == [prompt]


def test_written_prompts_are_held_out(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    assert prompt_accuracy.main(["--write-prompts", str(file), "--count", "50"]) == 0
    lines = file.read_text().splitlines()
    assert len(lines) == 50
    assert all(is_held_out(parse(line)) for line in lines)
