"""Divides work over ranks in fixed, numbered chunks; each becomes a file that is complete or absent.

A chunk depends on its number alone, so any number of ranks makes the same files, and a restart makes only the missing
ones.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dico_t2i.files import write_atomically
from dico_t2i.runs.folder import RunFolder
from dico_t2i.training.ranks.distributed import World

Compute = Callable[[range], dict[str, Tensor]]
_POLL_S = 2.0
_LOG_S = 60.0


class Chunks:
    """``total`` items in chunks of ``size``; the last chunk may be smaller."""

    def __init__(self, folder: Path, total: int, size: int) -> None:
        self.folder = folder
        self.ranges = [range(start, min(start + size, total)) for start in range(0, total, size)]

    def make(self, compute: Compute, world: World, title: str) -> None:
        """Compute the missing chunks, each on one rank, and wait until all of them exist; collective."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _Shown(title, len(self.ranges), self.done(), world.is_main) as shown:
            for k in range(world.rank, len(self.ranges), world.size):
                if not self._path(k).exists():
                    write_atomically(self._path(k), save(compute(self.ranges[k])))
                    shown.update(self.done())
            while world.is_main and self.done() < len(self.ranges):
                time.sleep(_POLL_S)
                shown.update(self.done())
        meet(world)

    @contextmanager
    def owned(self, world: World, patience_s: float = 0.0) -> Iterator[None]:
        """Keep other jobs out of the folder; collective. Raises ConfigError if another job uses it for too long."""
        with RunFolder(self.folder.parent, self.folder.name).locked(patience_s) if world.is_main else nullcontext():
            meet(world)
            yield

    def load(self) -> Iterator[dict[str, Tensor]]:
        """Yield the chunks in order. Raises ValueError for a chunk that cannot be read."""
        for k in range(len(self.ranges)):
            try:
                yield load_file(self._path(k))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self._path(k)}: {error}; delete it and start again") from None

    def remove(self) -> None:
        """Delete the chunks, once their results are saved elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def done(self) -> int:
        return sum(1 for _ in self.folder.glob("chunk-*.safetensors"))

    def _path(self, number: int) -> Path:
        return self.folder / f"chunk-{number:06d}.safetensors"


def meet(world: World) -> None:
    """Wait for all ranks; collective."""
    dist.barrier(device_ids=[world.local_rank] if world.device.type == "cuda" else None)


class _Shown:
    """A progress bar with the time left, estimated from the last hour; in a log, one line per minute."""

    def __init__(self, title: str, total: int, done: int, enabled: bool) -> None:
        self.title, self.total, self.enabled = title, total, enabled
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            "left",
            console=Console(stderr=True),
            disable=not (enabled and sys.stderr.isatty()),
            speed_estimate_period=3600,
        )
        self._task = self._bar.add_task(title, total=total, completed=done)
        self._began = self._printed = time.monotonic()
        self._before = done

    def __enter__(self) -> "_Shown":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def update(self, done: int) -> None:
        self._bar.update(self._task, completed=done)
        now = time.monotonic()
        if self.enabled and self._bar.disable and now - self._printed > _LOG_S and done > self._before:
            self._printed = now
            left = (now - self._began) / (done - self._before) * (self.total - done)
            print(f"{self.title}: {done} of {self.total} chunks, {left / 60:.0f} min left", file=sys.stderr, flush=True)
