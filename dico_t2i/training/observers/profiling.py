"""Writes a trace of a few steps, for chrome://tracing or Perfetto, and a table of the slowest operations."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dico_t2i.config import ProfileConfig

_ROWS = 40


class Profiler:
    """Traces the steps that a config selects; does nothing without one."""

    def __init__(self, config: ProfileConfig | None, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._running: profile | None = None
        self._begun = self._now = 0

    def at(self, step: int) -> None:
        """Start the trace, or end and write it, if this step says so; called before each step."""
        if self._config is None:
            return
        self._now = step
        if step == self._config.start:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._running = profile(activities=[ProfilerActivity.CPU, *cuda], record_shapes=True, profile_memory=True)
            self._running.start()
            self._begun = step
        elif self._running and step == self._begun + self._config.steps:
            self._write(step - 1)

    def close(self) -> None:
        """Write the trace if training ends during it."""
        if self._running:
            self._write(self._now)

    def _write(self, last: int) -> None:
        """Write steps-<first>-<last>.json.gz and .txt; a full disk loses the trace, but does not end the run."""
        assert self._running is not None
        running, self._running = self._running, None
        running.stop()
        key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        name = f"steps-{self._begun}-{last}"
        try:
            self._folder.mkdir(exist_ok=True)
            running.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
            table = running.key_averages().table(sort_by=key, row_limit=_ROWS)
            (self._folder / f"{name}.txt").write_text(table)
        except OSError as error:
            print(f"{self._folder}: the trace could not be written: {error}")
