"""Writes checkpoints in the background, and deletes expired ones.

A save copies the pieces to host memory and writes them in a thread while training continues. A save that is not in the
background needs no copy. ``runs.checkpoint`` describes the layout on disk.
"""

import json
import shutil
import threading
from collections.abc import Iterable, Iterator
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
from dico_t2i.runs.shard_file import checksums
from dico_t2i.training.retention import Retention
from dico_t2i.training.upload import Upload

SHARD = "shard-{:05d}.safetensors"

Held = tuple[str, int, dict[str, Tensor]]  # the name and start of a piece, and its tensors

_POLL_S, _REMOTE_POLL_S = 0.02, 1.0


class CheckpointWriter:
    """Saves in the background, one checkpoint at a time. All ranks make the same calls in the same order."""

    def __init__(
        self, folder: Path, rank: int, world: int, retention: Retention, background: bool = True, shared: bool = True
    ) -> None:
        """shared: whether all ranks see this folder; if not, rank 0 finds the others' parts by their uploads."""
        self.folder, self.rank, self.world = folder, rank, world
        self.retention, self.background, self.shared = retention, background, shared
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

    def save(
        self,
        step: int,
        pieces: Iterable[Piece],
        shapes: dict[str, torch.Size],
        state: dict[str, Any],
        upload: Upload | None = None,
    ) -> int:
        """Copy the pieces to host memory, start writing them, and return their size in bytes.

        ``state`` goes into the manifest: position, optimizer_steps, and everything else that a resume needs. upload:
        started when this rank's part is on disk.
        """
        self.wait()
        self.error = None
        keep = _copied if self.background else _unchanged
        held = [(p.name, p.start, {kind: keep(t) for kind, t in p.tensors.items()}) for p in pieces]
        size = sum(4 * tensor.numel() for _, _, kinds in held for tensor in kinds.values())
        meta: dict[str, Any] = {"version": VERSION, "step": step, "world": self.world, **state}
        meta["shapes"] = {name: list(shape) for name, shape in shapes.items()}
        self._thread = threading.Thread(target=self._write, args=(step, held, meta, upload), daemon=True)
        self._thread.start()
        if not self.background:
            self.wait()
        return size

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

    def _write(self, step: int, held: list[Held], meta: dict[str, Any], upload: Upload | None) -> None:
        target = self.folder / folder_name(step)
        try:
            target.mkdir(parents=True, exist_ok=True)  # rank 0 made its own
            _write_shard(target, self.rank, held)
            held.clear()
            if upload:
                upload.start()
            if self.rank == 0:
                self._commit(target, meta, None if self.shared else upload)
                write_atomically(self.folder / LATEST, target.name.encode())
                self._retire(step)
        except Exception as error:
            self.error = error

    def _commit(self, target: Path, meta: dict[str, Any], upload: Upload | None) -> None:
        """Wait for every rank's shard, then write the manifest."""
        shards = [SHARD.format(rank) for rank in range(self.world)]
        while (entries := upload.sidecars(shards) if upload else _sidecars(target, shards)) is None:
            if self._abandoned.wait(_REMOTE_POLL_S if upload else _POLL_S):
                raise CheckpointError(f"{target}: a different rank could not write its part")
        kinds = sorted({kind for entry in entries.values() for kind in entry.pop("kinds")})
        manifest = json.loads(json.dumps({**meta, "kinds": kinds, "files": entries}))
        signed = {**manifest, "sha256": manifest_hash(manifest)}
        write_atomically(target / MANIFEST, json.dumps(signed).encode())

    def _retire(self, newest: int) -> None:
        """Delete expired checkpoints, and the remains of incomplete saves."""
        found = {step_of(path): path for path in checkpoint_folders(self.folder)}
        complete = [step for step, path in found.items() if (path / MANIFEST).exists()]
        past = [step for step in complete if step <= newest]
        for step in self.retention.expired(past, lambda step: _loss(found[step])):
            (found[step] / MANIFEST).unlink()  # first, since a partly deleted folder must not count as a checkpoint
            shutil.rmtree(found[step])
        for step in found.keys() - complete:
            if step < newest:
                shutil.rmtree(found[step])


def _loss(folder: Path) -> float:
    return float(json.loads((folder / MANIFEST).read_text())["loss"])


def _sidecars(folder: Path, shards: Iterable[str]) -> dict[str, dict[str, Any]] | None:
    """The content of the sidecars of these shards; None until all are there."""
    paths = {shard: (folder / shard).with_suffix(".json") for shard in shards}
    if not all(path.exists() for path in paths.values()):
        return None
    return {shard: json.loads(path.read_text()) for shard, path in paths.items()}


def _write_shard(target: Path, rank: int, held: list[Held]) -> None:
    path = target / SHARD.format(rank)
    sums: dict[str, list[str | None]] = {kind: [None] * len(held) for _, _, kinds in held for kind in kinds}
    shapes = {f"{kind}:{name}:{start}": tensor.shape for name, start, kinds in held for kind, tensor in kinds.items()}
    digest = write_safetensors(path, shapes, _arrays(held, sums))
    entry = {
        "size": path.stat().st_size,
        "sha256": digest,
        "kinds": sorted(sums),
        "pieces": [[name, start, next(iter(kinds.values())).numel()] for name, start, kinds in held],
        "crc32": sums,
    }
    write_atomically(path.with_suffix(".json"), json.dumps(entry).encode())


def _arrays(held: list[Held], sums: dict[str, list[str | None]]) -> Iterator[np.ndarray]:
    """Yield each tensor in fp32 in host memory, after adding its checksums to ``sums``."""
    for number, (_, _, kinds) in enumerate(held):
        for kind, tensor in kinds.items():
            array = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
            sums[kind][number] = checksums(array.view(np.uint8).data)
            yield array


def _copied(tensor: Tensor) -> Tensor:
    """A copy in host memory, in fp32."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor.detach()
