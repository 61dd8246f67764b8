"""Scenes, captions and shards of the shapes data set."""

import io
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import shapes
from data_prep.shapes_scene import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    POSITION_JITTER,
    SHAPES,
    SIZE_JITTER,
    SIZES,
    Object,
    Scene,
    captions,
    held_out_prompts,
    is_held_out,
    parse,
    random_scene,
    render,
)
from dico_t2i.data.index import load_index
from dico_t2i.data.reader import ShardReader

ROOT = Path(__file__).resolve().parents[2]
RECIPE = {"size": 16, "seed": 3, "two_objects": 0.25, "held_out": False}
SINGLES = [
    Scene(background, (Object(*properties),))
    for background, *properties in product(BACKGROUNDS, SIZES, COLOURS, SHAPES, PLACES)
]


def test_every_caption_of_a_single_object_parses_back() -> None:
    assert len(SINGLES) == 960
    for scene in SINGLES:
        wordings = captions(scene)
        assert len(set(wordings)) == len(wordings) >= 3
        assert all(parse(wording) == scene for wording in wordings)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a small red thing on the left on a white background", "shape"),
        ("a small red blue circle on the left on a white background", "colour"),
        ("a small red circle on the left", "background"),
        ("", "size"),
    ],
)
def test_parse_names_what_is_absent_or_doubled(prompt: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"expected one {reason}"):
        parse(prompt)


def test_captions_of_two_objects_agree_with_the_pixels() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = random_scene(rng, two_objects=1.0, held_out=False)
        first, second = scene.objects
        image = render(scene, 64, rng).astype(float)
        y1, x1 = np.argwhere((image == COLOURS[first.colour]).all(-1)).mean(axis=0)
        y2, x2 = np.argwhere((image == COLOURS[second.colour]).all(-1)).mean(axis=0)
        for caption in captions(scene):
            order = caption.index(first.colour) < caption.index(second.colour)
            relation = {"to the left of": x1 < x2, "to the right of": x1 > x2, "above": y1 < y2, "below": y1 > y2}
            (holds,) = [value for words, value in relation.items() if words in caption]
            assert holds == order, caption


def test_held_out_combinations_leave_every_pair_in_training() -> None:
    kept = [scene for scene in SINGLES if not is_held_out(scene)]
    assert len(SINGLES) - len(kept) == 120
    seen = [(scene.background, scene.objects[0].colour, scene.objects[0].shape) for scene in kept]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        names = [list(BACKGROUNDS), list(COLOURS), list(SHAPES)]
        assert {(triple[a], triple[b]) for triple in seen} == set(product(names[a], names[b]))


@pytest.mark.parametrize("held_out", [False, True])
def test_random_scenes_keep_to_their_side(held_out: bool) -> None:
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, 0.25, held_out) for _ in range(2000)]
    assert {is_held_out(scene) for scene in scenes} == {held_out}
    assert 0.21 < np.mean([len(scene.objects) == 2 for scene in scenes]) < 0.29


def test_held_out_prompts_cover_all_evenly() -> None:
    prompts = held_out_prompts(300, seed=1)
    counts = {scene: 0 for _, scene in prompts}
    for prompt, scene in prompts:
        assert is_held_out(scene)
        assert parse(prompt) == scene
        counts[scene] += 1
    assert len(counts) == 120
    assert set(counts.values()) == {2, 3}
    assert prompts == held_out_prompts(300, seed=1) != held_out_prompts(300, seed=2)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_objects_have_their_colour_and_size(size: int) -> None:
    rng = np.random.default_rng(0)
    for scene in SINGLES[::7]:
        image = render(scene, size, rng)
        item = scene.objects[0]
        assert image.shape == (size, size, 3)
        area = (image == COLOURS[item.colour]).all(-1).mean()
        assert 0.4 * SIZES[item.size] ** 2 < area < 4.1 * SIZES[item.size] ** 2


@pytest.mark.parametrize("shape", SHAPES)
def test_no_jitter_cuts_an_object_off_or_joins_two(shape: str) -> None:
    axis = np.linspace(-2, 2, 801)
    inside = SHAPES[shape](axis[None, :], axis[:, None])
    reach = max(abs(axis[inside.any(axis=0)]).max(), abs(axis[inside.any(axis=1)]).max()) * (1 + SIZE_JITTER)
    for place in PLACES.values():
        assert min(*place, *np.subtract(1, place)) >= SIZES["large"] * reach + POSITION_JITTER
    gap = PLACES["right"][0] - PLACES["left"][0]
    assert gap == PLACES["bottom"][1] - PLACES["top"][1]
    assert gap >= 2 * (SIZES["small"] * reach + POSITION_JITTER)


def test_samples_depend_on_their_number_alone() -> None:
    one = shapes.make_sample(5, **RECIPE)
    assert one == shapes.make_sample(5, **RECIPE) != shapes.make_sample(6, **RECIPE)
    assert one != shapes.make_sample(5, **{**RECIPE, "seed": 4})


def test_script_writes_a_data_set_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shapes"
    (tmp_path / "shapes.partial").mkdir()  # left by an interrupted run
    (tmp_path / "shapes.partial" / "shard-000000.tar").write_bytes(b"half")
    arguments = ["--out", str(out), "--samples", "25", "--samples-per-shard", "10", "--seed", "3"]
    assert shapes.main(arguments) == 0
    index = load_index(out)
    assert (len(index), len(index.names), index.kind) == (25, 3, "images")
    sample = ShardReader(index).read(1, 2)
    expected = shapes.make_sample(12, **RECIPE)
    assert sample["png"] == expected["png"]
    assert json.loads(sample["json"])["captions"] == expected["json"]["captions"]
    assert Image.open(io.BytesIO(expected["png"])).size == (16, 16)

    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert shapes.main(arguments) == 0
    assert "already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(ValueError, match="other settings"):
        shapes.main([*arguments, "--held-out"])
    with pytest.raises(ValueError, match="other files"):
        shapes.main(["--out", str(tmp_path), "--samples", "5"])


def test_script_runs_from_the_root_and_bad_input_is_one_line() -> None:
    command = [sys.executable, "data_prep/shapes.py", "--out", "/nowhere", "--samples", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --samples")
    assert done.stderr.count("\n") == 1
