"""Reads the state of a run from its folder, for launching, supervising and listing runs."""

import fcntl
import os
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dico_t2i.runs.folder import MANIFEST
from dico_t2i.runs.log import json_lines

_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux


@dataclass(frozen=True)
class RunState:
    """The state of a run. Times are in seconds; None if the run has not reported a value yet."""

    name: str
    word: str  # done, running, stopped, failed, cut off, new, unreadable
    step: int
    steps: int | None
    stage: str  # the name of the newest stage; empty for a run without stages
    loss: float | None
    images_per_s: float | None
    eta_s: float | None
    checkpoint_age_s: float | None
    restarts: int
    trouble: str  # the last failure, in one line


def read_state(run_folder: Path) -> RunState:
    """Read the state from the files; a run that has not started is "new"."""
    lines = list(json_lines(run_folder / "metrics.jsonl"))
    reports = [line for line in lines if "loss" in line]
    events = [line for line in lines if "event" in line]
    starts = [line for line in events if line["event"] == "start"]
    totals = [line["total_steps"] for line in events if "total_steps" in line]
    last: dict[str, Any] = reports[-1] if reports else {}
    return RunState(
        name=run_folder.name,
        word=_word(run_folder, events),
        step=_newest_step(lines),
        steps=totals[-1] if totals else None,
        stage=next((str(line["stage"]) for line in reversed(events) if "stage" in line), ""),
        loss=last.get("loss"),
        images_per_s=last.get("images_per_s"),
        eta_s=last.get("eta_s"),
        checkpoint_age_s=_checkpoint_age(run_folder),
        restarts=max(0, len(starts) - 1),
        trouble=_trouble(run_folder),
    )


def unreadable(run_folder: Path, why: str) -> RunState:
    """The state of a run that cannot be read."""
    nothing = dict.fromkeys(("steps", "loss", "images_per_s", "eta_s", "checkpoint_age_s"))
    return RunState(
        name=run_folder.name, word="unreadable", step=0, stage="", restarts=0, trouble=f"step ?: {why}", **nothing
    )


def measured_pause(run_folder: Path) -> float | None:
    """The seconds of the run's slowest step plus its last save; None before they are known."""
    lines = list(json_lines(run_folder / "metrics.jsonl"))
    steps = [line["step_s"] for line in lines if "step_s" in line]
    saves = [line["seconds"] for line in lines if line.get("event") == "saved" and "seconds" in line]
    return max(steps) + saves[-1] if steps and saves else None


def holder(run_folder: Path) -> str:
    """The process that trains in this folder, as far as the file system shows; empty if there is none."""
    lock = run_folder / ".lock"
    if not lock.exists():
        return ""
    with lock.open() as file:  # reading the lock needs no write permission
        wish = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, wish))[0]
        return "" if kind == fcntl.F_UNLCK else file.read().strip() or "another process"


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints that have a manifest, oldest first."""
    return sorted(path.parent for path in run_folder.glob(f"checkpoints/step-*/{MANIFEST}"))


def last_step(run_folder: Path) -> int:
    """The last step that a run has reported."""
    return _newest_step(list(json_lines(run_folder / "metrics.jsonl")))


def _newest_step(lines: Sequence[dict[str, Any]]) -> int:
    """The step of the last line, without changes of the config, which are reported before the first step."""
    return next((line["step"] for line in reversed(lines) if line.get("event") != "config"), 0)


def tail(path: Path, size: int = 1 << 16) -> list[str]:
    """The last lines of a file; none if it does not exist."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        return file.read().decode(errors="replace").splitlines()


def _word(run_folder: Path, events: list[dict[str, Any]]) -> str:
    if holder(run_folder):
        return "running"
    ends = {"done": "done", "stop": "stopped", "failed": "failed", "hang": "failed", "start": "cut off"}
    told = [event["event"] for event in events if event["event"] in ends]
    return ends[told[-1]] if told else "new"


def _checkpoint_age(run_folder: Path) -> float | None:
    times = [(path / MANIFEST).stat().st_mtime for path in complete_checkpoints(run_folder)]
    return time.time() - max(times) if times else None


def _trouble(run_folder: Path) -> str:
    failures = list(json_lines(run_folder / "failures.jsonl"))
    if not failures:
        return ""
    last = failures[-1]
    return f"step {last['step']}: {last['error'].splitlines()[-1] if last['error'] else last['code']}"
