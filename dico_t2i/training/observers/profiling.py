"""A trace of a few steps, for chrome://tracing or Perfetto, and a table of what took longest."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dico_t2i.config import ProfileConfig

_ROWS = 40


class Profiler:
    """Traces the steps that a config names; does nothing without one."""

    def __init__(self, config: ProfileConfig | None, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._running: profile | None = None
        self._begun = self._now = 0

    def at(self, step: int) -> None:
        """Called before each step: begin, or end and write."""
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
        """Write a trace that training has ended in."""
        if self._running:
            self._write(self._now)

    def _write(self, last: int) -> None:
        """steps-<first>-<last>.json.gz and .txt; a full disk costs the trace and not the run."""
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
            print(f"{self._folder}: the trace was not written: {error}")
