"""Starts and ends data workers, and names the one that has died or is late."""

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

POLL_S = 1.0  # between two checks of the workers while a micro-batch is late
_MAX_NAMED_SHARDS = 4
_ORPHAN_POLL_S = 5.0  # between a worker's checks of its parent


@dataclass
class SupervisedLoader(Iterable[Batch]):
    """A DataLoader that names the worker in its error if one has died or is late."""

    loader: DataLoader[Batch]
    plan: MicroBatches
    rank: int
    timeout_s: float

    def __iter__(self) -> Iterator[Batch]:
        return _Supervision(self)


class _Supervision(Iterator[Batch]):
    def __init__(self, source: SupervisedLoader) -> None:
        self.source, self.plan = source, source.plan
        self.number = 0  # of the next micro-batch
        before = signal.getsignal(signal.SIGCHLD)
        # Blocked while workers are forked, so that threads that libraries start in them do not receive it either.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        self.batches: Any = iter(source.loader)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        if threading.current_thread() is threading.main_thread():
            # torch's own handler would raise during a step or a save; here a dead worker is found when its data is due.
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
                # A worker that is stopped would keep this process from ending.
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
        """The step and shards of the micro-batch that a worker has to send next."""
        number = self.number + (worker - self.number) % len(self.batches._workers)
        shards = self.plan.shards(number)
        more = f" and {len(shards) - _MAX_NAMED_SHARDS} more" if len(shards) > _MAX_NAMED_SHARDS else ""
        root = self.plan.samples.reader.index.location
        return f"step {self.plan.step(number)} waits for {', '.join(shards[:_MAX_NAMED_SHARDS])}{more} in {root}"


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def set_up_worker(parent: int, worker: int) -> None:
    """Make a worker ignore signals, except for the SIGTERM that the training process sends when it ends.

    A scheduler signals all processes of a job, but the training process still needs data to finish its step and save.
    A worker also ends if the training process has died.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # SIGTERM has been blocked in all threads since the fork, so that only the waiting thread receives it.
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: int) -> None:
    """Exit on the parent's SIGTERM, or if the parent was killed: the process then has a different parent."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, _ORPHAN_POLL_S)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
