"""Reports the numbers and events of a run to metrics.jsonl, the terminal, and the trackers of ``tracking``."""

import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dico_t2i.command import shows_bars
from dico_t2i.config import Config
from dico_t2i.runs.log import LogWriter
from dico_t2i.training.observers.tracking import Tracking


class Reporter:
    """Reports on rank 0, and does nothing on the others."""

    def __init__(self, config: Config, folder: Path, total_steps: int, enabled: bool) -> None:
        self.enabled, self.folder = enabled, folder
        if not enabled:
            return
        self._file = LogWriter(folder / "metrics.jsonl")
        self._tracking = Tracking(config, folder)
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(
            *columns,
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            disable=not shows_bars(self._console),
        )
        self._task = self._progress.add_task(config.name, total=total_steps, numbers="")
        self._progress.start()

    def advance(self, step: int) -> None:
        """Move the progress bar to ``step``."""
        if self.enabled:
            self._progress.update(self._task, completed=step)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Report numbers."""
        if not self.enabled:
            return
        self._write({"step": step, "time": time.time(), **values})
        self._tracking.log(step, values)
        numbers = "  ".join(
            f"{key} {_short(values[key])}" for key in ("loss", "val_loss", "grad_norm", "images_per_s") if key in values
        )
        self._progress.update(self._task, completed=step, numbers=numbers)
        if self._progress.disable:
            left = f"  left {_clock(values['eta_s'])}" if "eta_s" in values else ""
            self._console.print(f"step {step}  {numbers}{left}", highlight=False, soft_wrap=True)

    def event(self, step: int, kind: str, message: str, **details: Any) -> None:
        """Report an event: print it, and write it to metrics.jsonl and the trackers."""
        if not self.enabled:
            return
        self._write({"step": step, "time": time.time(), "event": kind, "message": message, **details})
        self._tracking.event(step, kind, message, details)
        self._console.print(f"[{kind}] {message}", highlight=False, markup=False, soft_wrap=True)

    def image(self, step: int, path: Path) -> None:
        """Report an image that was saved in the run folder."""
        self.event(step, "samples", f"samples at step {step}: {path}", file=str(path.relative_to(self.folder)))
        if self.enabled:
            self._tracking.image(step, path)

    def close(self) -> None:
        if self.enabled:
            self._progress.stop()
            self._file.close()
            self._tracking.finish()

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(line)
        except OSError as error:  # a full disk must not end the run
            print(f"{self._file.path}: a line was lost: {error}", file=sys.stderr)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
