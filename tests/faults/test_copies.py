"""Copies of checkpoints at a URL: a run goes on from them without its folder, and whatever happens to them."""

import json
import shutil
from pathlib import Path

import pytest

from dico_t2i.cli import main
from dico_t2i.runs.copies import fetch
from dico_t2i.runs.folder import RunFolder

from .harness import Report, Run, compare
from .test_damage import flip_a_bit

STEPS = "train.duration.steps=12"  # the same runs as in test_damage
NEWEST, BEFORE = "step-00000012", "step-00000009"


@pytest.fixture
def store(tmp_path) -> Path:
    """A folder that no rank knows but by its URL."""
    return tmp_path / "store"


@pytest.fixture
def only_a_copy(whole_run, new_run, store) -> Run:
    """A run of two ranks, of which there is only the copy."""
    shutil.copytree(whole_run(STEPS).path, store / "run")
    return new_run(f"checkpoint.path=file://{store}", "train.duration.steps=13")


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "apart"])
def test_a_run_goes_on_from_its_copy_bit_by_bit(whole_run, new_run, store, shared):
    run = new_run(f"checkpoint.path=file://{store}", STEPS, "checkpoint.keep_last=2")
    roots = None if shared else [run.root, run.root / "other"]  # of two nodes without a shared file system
    copies = store / "run" / "checkpoints"
    job = run.start(roots=roots, batches=8)  # one a step; at the end, the copy of step 6 would be gone
    job.until((copies / "step-00000006" / "manifest.json").exists)
    job.kill()
    for root in roots or [run.root]:
        shutil.rmtree(root / "run")
    assert run.start(roots=roots).wait() == [0, 0], run.jobs[-1].output
    assert run.jobs[-1].start_step == 6
    report = Report(ranks=2)
    compare(report, run, whole_run(STEPS))
    assert (report.lost, report.repeated, report.differences) == (0, 0, [])
    assert [path.name for path in sorted(copies.glob("step-*"))] == [BEFORE, NEWEST]  # retention is the same there
    shards = {"shard-00000.safetensors", "shard-00001.safetensors", "manifest.json"}
    assert {path.name for path in (copies / NEWEST).iterdir()} == shards


def test_a_damaged_copy_is_passed_over_by_any_number_of_ranks(only_a_copy, store):
    flip_a_bit(store / "run" / "checkpoints" / NEWEST / "shard-00001.safetensors")
    output = only_a_copy.train(ranks=1)
    assert f"{NEWEST} is skipped" in output
    assert "content does not match its hash" in output
    assert only_a_copy.jobs[-1].start_step == 9


def test_an_interrupted_upload_does_not_count(only_a_copy, store):
    newest = store / "run" / "checkpoints" / NEWEST
    (newest / "manifest.json").unlink()
    (newest / "shard-00001.safetensors").unlink()
    run = RunFolder(only_a_copy.root, "run")
    fetch(run, f"file://{store}/run")
    assert sorted(path.name for path in run.checkpoints.glob("step-*")) == ["step-00000006", BEFORE]


def test_uploads_that_fail_neither_end_nor_stall_a_run(new_run, tmp_path):
    (tmp_path / "file").touch()
    run = new_run(f"checkpoint.path=file://{tmp_path}/file/below", "train.duration.steps=4")
    output = run.train(ranks=1)
    assert "this checkpoint was not uploaded" in output
    assert [event["step"] for event in run.events("upload failed")] == [3, 4]
    assert run.valid_steps() == [3, 4]


def test_commands_take_the_url_of_a_copy(only_a_copy, store, tmp_path, monkeypatch):
    monkeypatch.setattr("dico_t2i.runs.copies._CACHE", tmp_path / "cache")
    exported = tmp_path / "exported"
    url = f"file://{store}/run/checkpoints/{BEFORE}"
    with pytest.raises(SystemExit, match="0"):
        main(["export", "--checkpoint", url, "--no-encoders", "--out", str(exported)])
    assert json.loads((exported / "export.json").read_text())["step"] == 9
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
