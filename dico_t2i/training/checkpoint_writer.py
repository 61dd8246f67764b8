"""Writes checkpoints in the background, and deletes expired ones.

A save copies the pieces to host memory and writes them in a thread while training continues. ``runs.checkpoint``
describes the layout on disk.
"""

import json
import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dico_t2i.files import write_atomically
from dico_t2i.runs.checkpoint import (
    LATEST,
    VERSION,
    CheckpointError,
    Piece,
    checkpoint_folders,
    folder_name,
    manifest_hash,
    step_of,
)
from dico_t2i.runs.folder import MANIFEST
from dico_t2i.runs.safetensors_writer import write_safetensors


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: the last ones, those of every N-th step, and the one with the lowest loss.

    steps: further steps whose checkpoints are kept: where stages began, and where the learning rate begins to fall.
    """

    last: int
    every_steps: int | None = None
    best: bool = False
    steps: frozenset[int] = frozenset()

    def expired(self, folder: Path) -> list[Path]:
        """The complete checkpoints that may be deleted, oldest first."""
        complete = [path for path in checkpoint_folders(folder) if (path / MANIFEST).exists()]
        kept = set(complete[-self.last :]) | {path for path in complete if step_of(path) in self.steps}
        if self.every_steps:
            kept |= {path for path in complete if step_of(path) % self.every_steps == 0}
        if self.best:
            kept.add(min(complete, key=lambda path: json.loads((path / MANIFEST).read_text())["loss"]))
        return [path for path in complete if path not in kept]


class CheckpointWriter:
    """Saves in the background, one checkpoint at a time. All ranks make the same calls in the same order."""

    def __init__(self, folder: Path, rank: int, world: int, retention: Retention, background: bool = True) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        self.retention, self.background = retention, background
        self.error: Exception | None = None  # of the last finished save
        self._thread: threading.Thread | None = None
        self._abandoned = threading.Event()

    def prepare(self, step: int) -> None:
        """Create the folder, or set ``error``. Only rank 0 calls this; the others wait for it before ``save``."""
        target = self.folder / folder_name(step)
        try:
            if target.exists():
                shutil.rmtree(target)
            target.mkdir(parents=True)
        except OSError as error:
            self.error = error

    def save(self, step: int, pieces: Iterable[Piece], shapes: dict[str, torch.Size], state: dict[str, Any]) -> int:
        """Copy the pieces to host memory, start writing them, and return their size in bytes.

        ``state`` goes into the manifest: position, optimizer_steps, and everything else that a resume needs.
        """
        self.wait()
        self.error = None
        host = [(p.name, p.start, {kind: _to_host(t) for kind, t in p.tensors.items()}) for p in pieces]
        meta: dict[str, Any] = {"version": VERSION, "step": step, "world": self.world, **state}
        meta["shapes"] = {name: list(shape) for name, shape in shapes.items()}
        self._thread = threading.Thread(target=self._write, args=(step, host, meta), daemon=True)
        self._thread.start()
        if not self.background:
            self.wait()
        return sum(array.nbytes for _, _, arrays in host for array in arrays.values())

    @property
    def busy(self) -> bool:
        """Whether a save is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the current save is on disk, or has failed (see ``error``)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def abandon(self, step: int) -> None:
        """Give up a save that failed on any rank, and delete its files."""
        self._abandoned.set()
        self.wait()
        self._abandoned.clear()
        if self.rank == 0:
            shutil.rmtree(self.folder / folder_name(step), ignore_errors=True)

    def _write(self, step: int, host: list[tuple[str, int, dict[str, np.ndarray]]], meta: dict[str, Any]) -> None:
        target = self.folder / folder_name(step)
        try:
            _write_shard(target, self.rank, host)
            if self.rank == 0:
                _commit(target, self.world, meta, self._abandoned)
                write_atomically(self.folder / LATEST, target.name.encode())
                self._retire(step)
        except Exception as error:
            self.error = error

    def _retire(self, newest: int) -> None:
        """Delete expired checkpoints, and the remains of incomplete saves."""
        for path in self.retention.expired(self.folder):
            (path / MANIFEST).unlink()  # first, since a partly deleted folder must not count as a checkpoint
            shutil.rmtree(path)
        for path in checkpoint_folders(self.folder):
            if not (path / MANIFEST).exists() and step_of(path) < newest:
                shutil.rmtree(path)


def _write_shard(target: Path, rank: int, host: list[tuple[str, int, dict[str, np.ndarray]]]) -> None:
    arrays = {f"{kind}:{name}:{start}": a for name, start, kinds in host for kind, a in kinds.items()}
    path = target / f"shard-{rank:05d}.safetensors"
    digest = write_safetensors(path, {key: a.shape for key, a in arrays.items()}, arrays.values())
    entry = {
        "size": path.stat().st_size,
        "sha256": digest,
        "kinds": sorted({kind for _, _, kinds in host for kind in kinds}),
        "pieces": [[name, start, next(iter(kinds.values())).size] for name, start, kinds in host],
    }
    write_atomically(path.with_suffix(".json"), json.dumps(entry).encode())


def _commit(target: Path, world: int, meta: dict[str, Any], abandoned: threading.Event) -> None:
    """Wait for every rank's shard, then write the manifest."""
    sidecars = [target / f"shard-{rank:05d}.json" for rank in range(world)]
    while not all(path.exists() for path in sidecars):
        if abandoned.wait(0.02):
            raise CheckpointError(f"{target}: a different rank could not write its part")
    entries = {path.with_suffix(".safetensors").name: json.loads(path.read_text()) for path in sidecars}
    kinds = sorted({kind for entry in entries.values() for kind in entry.pop("kinds")})
    manifest = json.loads(json.dumps({**meta, "kinds": kinds, "files": entries}))
    signed = {**manifest, "sha256": manifest_hash(manifest)}
    write_atomically(target / MANIFEST, json.dumps(signed).encode())


def _to_host(tensor: Tensor) -> np.ndarray:
    return np.array(tensor.detach().float().cpu().numpy(), copy=True)
