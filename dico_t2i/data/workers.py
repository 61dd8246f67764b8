"""Data workers: how they start and end, and which of them is named when one dies or is late."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from dico_t2i.data.batches import Batch, MicroBatches
from dico_t2i.data.errors import DataError

POLL_S = 1.0  # between two looks at the workers while a micro-batch is late
_MAX_NAMED_SHARDS = 4
_ORPHAN_POLL_S = 5.0  # between two looks of a worker at its parent


@dataclass
class SupervisedLoader(Iterable[Batch]):
    """A DataLoader whose workers are named when they die or are late."""

    loader: DataLoader[Batch]
    plan: MicroBatches
    rank: int
    timeout_s: float

    def __iter__(self) -> Iterator[Batch]:
        return _Supervision(self)


class _Supervision(Iterator[Batch]):
    def __init__(self, source: SupervisedLoader) -> None:
        self.source, self.plan = source, source.plan
        self.number = 0  # of the micro-batch that is next
        before = signal.getsignal(signal.SIGCHLD)
        # Held back while workers are made: what libraries start in them right after the fork must not take it either.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        self.batches: Any = iter(source.loader)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        if threading.current_thread() is threading.main_thread():
            # torch's own handler would raise in the middle of a step or a save; here a death shows when data are due.
            signal.signal(signal.SIGCHLD, before)

    def __next__(self) -> Batch:
        started = time.monotonic()
        while True:
            try:
                batch = next(self.batches)
            except (RuntimeError, OSError, EOFError) as error:
                self._check_alive(error)
                if not str(error).startswith("DataLoader timed out"):
                    raise
            else:
                self.number += 1
                return batch
            waited = time.monotonic() - started
            if self.source.timeout_s and waited >= self.source.timeout_s:
                worker = self.number % len(self.batches._workers)
                # A stopped process would keep this one from leaving.
                self.batches._workers[worker].kill()
                raise DataError(f"{self._name(worker)} gave no data for {waited:.0f} s; {self._owed(worker)}")

    def _check_alive(self, error: Exception) -> None:
        for worker, process in enumerate(self.batches._workers):
            if process.exitcode is not None:
                message = f"{self._name(worker)} {_ending(process.exitcode)}; {self._owed(worker)}"
                raise DataError(message) from error

    def _name(self, worker: int) -> str:
        return f"data worker {worker} (pid {self.batches._workers[worker].pid}) of rank {self.source.rank}"

    def _owed(self, worker: int) -> str:
        """The step and shards of the micro-batch that a worker has to give next."""
        number = self.number + (worker - self.number) % len(self.batches._workers)
        shards = self.plan.shards(number)
        more = f" and {len(shards) - _MAX_NAMED_SHARDS} more" if len(shards) > _MAX_NAMED_SHARDS else ""
        root = self.plan.samples.reader.index.location
        return f"step {self.plan.step(number)} needs of it {', '.join(shards[:_MAX_NAMED_SHARDS])}{more} in {root}"


def _ending(code: int) -> str:
    if code >= 0:
        return f"left with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def set_up_worker(parent: int, worker: int) -> None:
    """Leave signals to the training process: its own SIGTERM, sent at its exit, ends a worker, or its death.

    A scheduler signals all processes of a job, and the trainer still wants its data to finish and save.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # SIGTERM is blocked since the fork, in all threads: it reaches nobody but the waiting one.
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: int) -> None:
    """A parent that was killed sends nothing: the worker then has another one."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, _ORPHAN_POLL_S)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
