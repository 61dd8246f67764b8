"""Damaged checkpoints: never loaded, never deleted unasked, and the user is told which and why."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .harness import Report, Run, compare

STEPS = "train.duration.steps=12"  # checkpoints at 6, 9 and 12 are kept
NEWEST, BEFORE = "step-00000012", "step-00000009"


@pytest.fixture
def finished(whole_run, new_run) -> Run:
    """A copy of a finished run, of two ranks, to damage."""
    run = new_run(STEPS)
    shutil.copytree(whole_run(STEPS).path, run.path)
    return run


def flip_a_bit(path: Path, at: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def move_the_data(manifest: Path) -> None:
    """What a flipped bit can do to a number: still JSON, another position."""
    tree = json.loads(manifest.read_text())
    text = manifest.read_text()
    manifest.write_text(text.replace(f'"position": {tree["position"]}', f'"position": {tree["position"] ^ 8}'))
    assert manifest.read_text() != text


def zero(path: Path) -> None:
    path.write_bytes(bytes(100))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def hollow(path: Path) -> None:
    path.write_text("{}")


# What is damaged in the newest checkpoint, how, and what the user must read about it.
DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("shard-00000.safetensors", flip_a_bit, "hash"),
    ("shard-00001.safetensors", flip_a_bit, "hash"),
    ("shard-00000.safetensors", cut_off, "bytes, should be"),
    ("shard-00001.safetensors", cut_off, "bytes, should be"),
    ("shard-00001.safetensors", Path.unlink, "missing"),
    ("manifest.json", Path.unlink, "no manifest.json"),
    ("manifest.json", cut_off, "not readable"),
    ("manifest.json", zero, "not readable"),
    ("manifest.json", empty, "not readable"),
    ("manifest.json", hollow, ""),
    ("manifest.json", move_the_data, ""),
]


@pytest.mark.parametrize(("file", "damage", "why"), DAMAGE, ids=[f"{d[0]}-{d[1].__name__}" for d in DAMAGE])
def test_the_newest_valid_one_is_loaded_and_the_user_told_why(finished, file, damage, why):
    damage(finished.checkpoints / NEWEST / file)
    output = finished.train("train.duration.steps=13")
    told = [line for line in output.splitlines() if f"{NEWEST}" in line and ("bad" in line or "skipped" in line)]
    assert finished.jobs[-1].start_step == 9
    assert f"resumed from {finished.checkpoints / BEFORE}" in output
    assert any(file in line and why in line for line in told), output


@pytest.mark.parametrize("text", ["", "step-00000099", "\x00\xff", NEWEST[:-1]])
def test_a_bad_pointer_does_no_harm(finished, text):
    (finished.checkpoints / "latest").write_text(text, encoding="latin-1")
    finished.train("train.duration.steps=13")
    assert finished.jobs[-1].start_step == 12


def test_a_pointer_that_was_not_switched_in_time_does_not_hide_the_newest(finished):
    (finished.checkpoints / "latest").write_text(BEFORE)
    finished.train("train.duration.steps=13")
    assert finished.jobs[-1].start_step == 12


def test_remains_of_saves_that_were_cut_off_do_no_harm(finished, whole_run):
    shutil.rmtree(finished.checkpoints / NEWEST)
    for name, files in (("step-00000010", 0), ("step-00000011", 1), ("step-00000012", 2)):
        (finished.checkpoints / name).mkdir()
        for path in sorted((finished.checkpoints / BEFORE).glob("shard-*"))[:files]:
            shutil.copy(path, finished.checkpoints / name)
    (finished.checkpoints / BEFORE / ".manifest.json.123").write_text("{")
    finished.train()
    assert finished.jobs[-1].start_step == 9
    whole, report = whole_run(STEPS), Report(ranks=2)
    finished.jobs.insert(0, whole.jobs[0])
    compare(report, finished, whole)
    assert (report.lost, report.repeated, report.differences) == (0, 0, [])
    assert finished.valid_steps()[-2:] == [9, 12]


def test_nothing_is_deleted_when_none_is_whole(finished):
    for path in finished.checkpoints.glob("*/shard-00001.safetensors"):
        flip_a_bit(path)
    files = {path: path.read_bytes() for path in finished.checkpoints.rglob("*") if path.is_file()}
    output = finished.train("train.duration.steps=13", code=2)
    assert "all 3 checkpoints are damaged" in output
    assert "Traceback" not in output
    assert all(f"step-{step:08d} is skipped" in output for step in (6, 9, 12))
    assert files == {path: path.read_bytes() for path in finished.checkpoints.rglob("*") if path.is_file()}


def test_manifests_lost_from_all_are_not_taken_for_a_new_run(finished):
    for path in finished.checkpoints.glob("*/manifest.json"):
        path.unlink()
    files = sorted(finished.checkpoints.rglob("*"))
    output = finished.train("train.duration.steps=13", code=2)
    assert "Traceback" not in output
    assert sorted(finished.checkpoints.rglob("*")) == files
