"""A full disk: training goes on, the checkpoint before stays valid, the warning is loud; with space it saves again."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .harness import Job, Run

LAST = 90
STEPS = f"train.duration.steps={LAST}"
SIZE = 8 << 20  # bytes: room for some ten checkpoints of the tiny model


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A tmpfs at this folder. Skips the test where mounting is not permitted."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path, leave: int) -> None:
    """Write zeros until only ``leave`` bytes are free."""
    status = os.statvfs(path.parent)
    with path.open("wb") as file:
        file.write(bytes(status.f_bavail * status.f_frsize - leave))


def fill_while_training(run: Run, job: Job, leave: int) -> Path:
    """Fill the disk between two steps, after some saves; returns the file to delete for space."""
    job.until(lambda: run.saves() >= 3)
    for rank in range(2):
        job.signal(rank, signal.SIGSTOP)
    filler = run.checkpoints / "filler"
    fill(filler, leave)
    for rank in range(2):
        job.signal(rank, signal.SIGCONT)
    return filler


@pytest.mark.parametrize(
    "leave",
    [pytest.param(0, id="nothing left", marks=pytest.mark.long), pytest.param(400_000, id="room for a part")],
)
def test_a_full_disk_under_the_checkpoints(new_run, leave):
    run = new_run(STEPS)
    with small_disk(run.checkpoints):
        job = run.start()
        filler = fill_while_training(run, job, leave)
        before = run.valid_steps()
        job.until(lambda: run.events("save failed"))
        failed = run.events("save failed")[0]
        job.until(lambda: run.reached(failed["step"] + 4))  # training goes on
        assert before[-1] in run.valid_steps()
        filler.unlink()
        job.until(lambda: (run.checkpoints / "latest").read_text().strip() > f"step-{failed['step']:08d}")
        assert run.valid_steps()[-1] > failed["step"]
        assert job.wait() == [0, 0], job.output
        assert "No space left" in failed["message"]
        assert "WARNING" in job.output
        failures = [event["step"] for event in run.events("save failed")]
        assert len(failures) == len(set(failures)), "each failure is told once"
        assert sorted(run.losses()) == list(range(1, LAST + 1))
        steps = run.valid_steps()
        assert steps[-1] == LAST
        names = {"latest", *(f"step-{step:08d}" for step in steps)}
        assert {path.name for path in run.checkpoints.iterdir()} == names, "something is left of the failed saves"


def test_a_full_disk_under_the_whole_run(new_run):
    """metrics.jsonl cannot be written either; training still goes on, and the terminal tells why."""
    run = new_run(STEPS)
    with small_disk(run.path):
        job = run.start()
        filler = fill_while_training(run, job, 0)
        job.until(lambda: "save failed" in job.output)
        there = job.last_step
        job.until(lambda: job.last_step >= there + 20)  # far enough for metrics.jsonl to need another page
        filler.unlink()
        assert job.wait() == [0, 0], job.output
        assert run.valid_steps()[-1] == job.last_step == LAST
        assert run.metrics()[-1]["event"] == "done"  # and every line can be read
