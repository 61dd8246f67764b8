"""Copies a checkpoint to a URL in the background. ``runs.copies`` describes the layout there.

Each rank copies its own files, first a shard and then its sidecar. When all sidecars are there, rank 0 copies the
manifest, which makes the copy complete. Sidecars have names that no other upload uses, so that those of an interrupted
one are not taken for new ones.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dico_t2i import remote
from dico_t2i.files import write_atomically
from dico_t2i.runs.checkpoint import LATEST, UPLOADED, folder_name, step_of
from dico_t2i.runs.copies import RECORDS, complete_steps
from dico_t2i.runs.folder import MANIFEST, RunFolder
from dico_t2i.training.retention import Retention

_RETRIES, _RETRY_WAIT_S = 5, 1.0
_LONGEST_POLL_S = 2.0


@dataclass(frozen=True)
class Target:
    """Where a run's checkpoints are copied to. token: a text that the ranks share, and no other start of the run."""

    run: RunFolder
    url: str
    token: str
    rank: int


class Upload(threading.Thread):
    """Copies this rank's files of one checkpoint and, on rank 0, completes the copy."""

    def __init__(self, target: Target, step: int, files: Sequence[str], number: int, retention: Retention) -> None:
        """files: the shards that this rank copies. number: that of the upload, the same on all ranks."""
        super().__init__(name="upload", daemon=True)
        self.target, self.step, self.files, self.retention = target, step, files, retention
        self.folder = target.run.checkpoints / folder_name(step)
        self.url = f"{target.url}/checkpoints/{folder_name(step)}"
        self.mark = f"{target.token}-{number}.json"  # the end of the sidecars' names
        self.problem = ""  # why it has failed, or what could not be deleted after it
        self.complete = False
        self.ended = threading.Event()
        self.abandoned = threading.Event()

    def run(self) -> None:
        try:
            if self.target.rank == 0:  # while shards are replaced, the checkpoint that was there is not complete
                self._patiently(lambda: remote.remove(f"{self.url}/{MANIFEST}"))
            for file in self.files:
                self._copy(file, file)
                self._copy(f"{_stem(file)}.json", f"{_stem(file)}.{self.mark}")
            if self.target.rank == 0:
                self._complete()
        except Exception as error:  # a failed copy must not end the training
            self.problem = f"{type(error).__name__}: {error}"
        self.ended.set()

    def sidecars(self, shards: Sequence[str]) -> dict[str, dict[str, Any]] | None:
        """The content of the sidecars of these shards; None until all are there. Raises OSError."""
        names = {shard: f"{_stem(shard)}.{self.mark}" for shard in shards}
        there = self._patiently(lambda: remote.files(self.url))
        if not all(name in there for name in names.values()):
            return None
        return {
            shard: json.loads(self._patiently(lambda name=name: remote.read(f"{self.url}/{name}")))  # type: ignore[misc]
            for shard, name in names.items()
        }

    def _complete(self) -> None:
        self._wait_until((self.folder / MANIFEST).exists)
        manifest = json.loads((self.folder / MANIFEST).read_text())
        marked = [f"{_stem(file)}.{self.mark}" for file in manifest["files"]]
        self._wait_until(lambda: remote.files(self.url).keys() >= set(marked))
        for name in RECORDS:
            if (self.target.run.path / name).exists():
                self._patiently(
                    lambda name=name: remote.upload(self.target.run.path / name, f"{self.target.url}/{name}")  # type: ignore[misc]
                )
        self._copy(MANIFEST, MANIFEST)
        self._patiently(lambda: remote.write(f"{self.target.url}/checkpoints/{LATEST}", self.folder.name.encode()))
        write_atomically(self.folder / UPLOADED, self.url.encode())
        self.complete = True
        for name in marked:
            remote.remove(f"{self.url}/{name}")
        self._retire()

    def _retire(self) -> None:
        """Delete expired copies, and the remains of incomplete ones."""
        there = remote.files(self.target.url)
        complete = [step_of(self.folder.with_name(name)) for name in complete_steps(there)]
        past = [step for step in complete if step <= self.step]
        for step in self.retention.expired(past, self._loss):
            self._remove(step)
        begun = {name.split("/")[1] for name in there if name.startswith("checkpoints/step-")}
        for step in {step_of(self.folder.with_name(name)) for name in begun} - set(complete):
            if step < self.step:
                self._remove(step)

    def _remove(self, step: int) -> None:
        url = f"{self.target.url}/checkpoints/{folder_name(step)}"
        remote.remove(f"{url}/{MANIFEST}")  # first, since a partly deleted folder must not count as a checkpoint
        remote.remove(url)

    def _loss(self, step: int) -> float:
        content = remote.read(f"{self.target.url}/checkpoints/{folder_name(step)}/{MANIFEST}")
        return float(json.loads(content)["loss"])

    def _copy(self, name: str, to: str) -> None:
        self._patiently(lambda: remote.upload(self.folder / name, f"{self.url}/{to}"))

    def _patiently(self, work: Callable[[], Any]) -> Any:
        if self.abandoned.is_set():
            raise OSError("given up")
        return remote.patiently(work, _RETRIES, _RETRY_WAIT_S)

    def _wait_until(self, happened: Callable[[], bool]) -> None:
        pause = 0.02
        while not self._patiently(happened):
            if self.abandoned.is_set():
                raise OSError("given up")
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_POLL_S)


def _stem(file: str) -> str:
    return file.removesuffix(".safetensors")
