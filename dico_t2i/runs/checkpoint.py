"""Checkpoints: fp32 pieces of parameters in safetensors files; a checkpoint is valid once it has a manifest.

    checkpoints/
      step-00001000/
        shard-00000.safetensors   the pieces of rank 0: "<kind>:<parameter>:<start>" -> (numel,) fp32
        shard-00000.json          the size and hash of that file, written after it
        manifest.json             written last, by rank 0; makes the checkpoint valid
        uploaded                  with checkpoint.path: the URL of its complete copy, from which missing files are read
      latest                      the name of the newest complete checkpoint, replaced atomically; for people and tools,
                                  since a resume tries the folders themselves, newest first

Any number of ranks with any ZeRO stage reads the ranges that it needs, and compares their checksums as it reads.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dico_t2i.remote import files as remote_files
from dico_t2i.runs.folder import MANIFEST
from dico_t2i.runs.kinds import WEIGHT
from dico_t2i.runs.shard_file import WINDOW, CheckpointError, DamagedError, FileEntry, ShardFile

VERSION = 1


PROJECTOR = "alignment"  # parameters below this name train with the network, but do not belong to it


LATEST = "latest"
UPLOADED = "uploaded"

_MANIFEST_KEYS = {"version", "step", "position", "optimizer_steps", "world", "shapes", "kinds", "files"}


@dataclass(frozen=True)
class Piece:
    """The range [start, start + numel) of a flattened parameter, in fp32, as views of this rank's tensors."""

    name: str
    start: int
    tensors: dict[str, Tensor]  # "weight", "exp_avg", "exp_avg_sq", "ema_<decay>": (numel,)

    @property
    def numel(self) -> int:
        return self.tensors[WEIGHT].numel()

    def narrow(self, start: int, stop: int) -> "Piece":
        """The part of this piece from ``start`` to ``stop``, relative to its own start."""
        return Piece(self.name, self.start + start, {k: v[start:stop] for k, v in self.tensors.items()})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest has been read."""

    path: Path
    step: int  # optimizer steps, including skipped ones
    position: int  # samples consumed; the data resumes here
    optimizer_steps: int  # updates of the weights
    state: dict[str, Any]  # the other values given to ``save``
    world: int
    shapes: dict[str, tuple[int, ...]]
    kinds: tuple[str, ...]
    files: dict[str, FileEntry]
    pieces: dict[str, list[tuple[str, int, int]]] = field(repr=False)  # name -> (file, start, numel)
    sha256: str  # of the manifest, which has the hashes of all files
    url: str | None = None  # the folder of its complete copy

    @property
    def network_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the network's own parameters."""
        return {name: shape for name, shape in self.shapes.items() if not name.startswith(f"{PROJECTOR}.")}


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a manifest. Raises CheckpointError if it is missing, damaged, or from a newer version of this package."""
    return parse_checkpoint(path, *read_manifest(path))


def read_manifest(path: Path) -> tuple[str, str | None]:
    """The text of a manifest, and the URL of the checkpoint's copy. Raises CheckpointError if it cannot be read."""
    try:
        text = (path / MANIFEST).read_text()
        return text, (path / UPLOADED).read_text().strip() if (path / UPLOADED).exists() else None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no {MANIFEST}, so this checkpoint was never completed") from None
    except ValueError as error:
        raise CheckpointError(f"{path / MANIFEST}: not readable: {error!r}") from None


def parse_checkpoint(path: Path, text: str, url: str | None = None) -> Checkpoint:
    """The checkpoint that the text of a manifest describes. Raises CheckpointError as ``open_checkpoint`` does."""
    try:
        manifest = json.loads(text)
        digest = manifest.pop("sha256")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: not readable: {error!r}") from None
    if digest != manifest_hash(manifest):
        raise CheckpointError(f"{path / MANIFEST}: content does not match its hash")
    if manifest["version"] > VERSION:
        raise CheckpointError(f"{path}: written by a newer version ({manifest['version']}); update dico_t2i")
    pieces: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
    for file, entry in manifest["files"].items():
        for name, start, numel in entry["pieces"]:
            pieces[name].append((file, start, numel))
    return Checkpoint(
        path=path,
        step=manifest["step"],
        position=manifest["position"],
        optimizer_steps=manifest["optimizer_steps"],
        state={key: manifest[key] for key in manifest if key not in _MANIFEST_KEYS},
        world=manifest["world"],
        shapes={name: tuple(shape) for name, shape in manifest["shapes"].items()},
        kinds=tuple(manifest["kinds"]),
        files={
            file: FileEntry(entry["size"], entry["sha256"], entry["pieces"], entry.get("crc32"))
            for file, entry in manifest["files"].items()
        },
        pieces=dict(pieces),
        sha256=digest,
        url=url,
    )


def check_sizes(checkpoint: Checkpoint) -> None:
    """Raise DamagedError that names the first file that is missing, or has another size, on disk and in the copy."""
    elsewhere: dict[str, int] | None = None
    for file, entry in checkpoint.files.items():
        path = checkpoint.path / file
        found = path.stat().st_size if path.exists() else None
        if found != entry.size and checkpoint.url:
            elsewhere = remote_files(checkpoint.url) if elsewhere is None else elsewhere
            found = elsewhere.get(file, found)
        if found is None:
            raise DamagedError(f"{path}: missing")
        if found != entry.size:
            raise DamagedError(f"{path}: {found} bytes, should be {entry.size}")


def verify(checkpoint: Checkpoint, files: Sequence[str] | None = None) -> None:
    """Compare sizes and hashes of some or all files. Raises CheckpointError that names the first different file."""
    with Shards(checkpoint) as shards:
        for file in checkpoint.files if files is None else files:
            shards.file(file).verify()


def candidates(folder: Path) -> list[Path]:
    """All checkpoint folders, complete or not, newest first."""
    return checkpoint_folders(folder)[::-1]


def newest_checkpoint(folder: Path) -> Checkpoint:
    """The newest complete checkpoint; its shards are not verified. Raises CheckpointError if there is none."""
    for path in candidates(folder):
        if (path / MANIFEST).exists():
            return open_checkpoint(path)
    raise CheckpointError(f"{folder.parent}: this run has no complete checkpoint yet")


def ever_saved(folder: Path) -> bool:
    """Whether a save was ever completed in this folder."""
    return (folder / LATEST).exists()


def fill(checkpoint: Checkpoint, pieces: Iterable[Piece]) -> int:
    """Read the range of each piece from the checkpoint, and return how many bytes were read.

    Raises CheckpointError if a parameter, a range or a kind is missing, or is not what was written. An average that the
    checkpoint does not have starts from its weights.
    """
    with Shards(checkpoint) as shards:
        for piece in pieces:
            if piece.name not in checkpoint.shapes:
                raise CheckpointError(f"{checkpoint.path}: has no parameter {piece.name}")
            for kind, tensor in piece.tensors.items():
                source = kind if kind in checkpoint.kinds else WEIGHT
                shards.read(source, piece.name, piece.start, tensor)
        return shards.bytes_read


def check_shapes(checkpoint: Checkpoint, shapes: dict[str, torch.Size]) -> None:
    """Raise CheckpointError, with the first differences, if the checkpoint belongs to a different model."""
    ours = {name: tuple(shape) for name, shape in shapes.items()}
    differences = [
        f"{name}: {checkpoint.shapes.get(name, 'absent')} in the checkpoint, {ours.get(name, 'absent')} in the config"
        for name in sorted(ours.keys() | checkpoint.shapes.keys())
        if checkpoint.shapes.get(name) != ours.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"{checkpoint.path} belongs to a different model ({len(differences)} parameters differ):"
            f" {'; '.join(differences[:3])}. Use the config that it was trained with, or a different run name"
        )


def read_weights(checkpoint: Checkpoint, kind: str) -> Iterator[tuple[str, Tensor]]:
    """The network's parameters of one kind ("weight", "ema_0.9999"), in fp32, one whole parameter at a time.

    Raises CheckpointError, with the existing kinds, if the checkpoint does not have this one.
    """
    if kind not in checkpoint.kinds:
        raise CheckpointError(f"{checkpoint.path}: no {kind}; it holds {', '.join(checkpoint.kinds)}")
    return _whole_parameters(checkpoint, kind)


def _whole_parameters(checkpoint: Checkpoint, kind: str) -> Iterator[tuple[str, Tensor]]:
    with Shards(checkpoint) as shards:
        for name, shape in checkpoint.network_shapes.items():
            whole = torch.empty(shape)
            shards.read(kind, name, 0, whole.view(-1))
            yield name, whole


class Shards:
    """The open shard files of a checkpoint; reads ranges that may span several of them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._open: dict[str, ShardFile] = {}
        self._buffer = memoryview(bytearray(WINDOW))

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    @property
    def bytes_read(self) -> int:
        """How many bytes of the open files were read."""
        return sum(file.bytes_read for file in self._open.values())

    def read(self, kind: str, name: str, start: int, target: Tensor) -> None:
        """Fill target (numel,) with the parameter's elements from ``start`` on."""
        stop, filled = start + target.numel(), 0
        for file, piece_start, numel in self.checkpoint.pieces.get(name, ()):
            begin, end = max(start, piece_start), min(stop, piece_start + numel)
            if begin < end:
                part = target[begin - start : end - start]
                self.file(file).read(f"{kind}:{name}:{piece_start}", begin - piece_start, part)
                filled += end - begin
        if filled != target.numel():
            raise CheckpointError(
                f"{self.checkpoint.path}: {kind} of {name} has {filled} of the {target.numel()} elements from {start}"
            )

    def file(self, name: str) -> ShardFile:
        """A file of the checkpoint, which is opened if it is not open yet."""
        if name not in self._open:
            url = f"{self.checkpoint.url}/{name}" if self.checkpoint.url else None
            path = self.checkpoint.path / name
            self._open[name] = ShardFile(path, url, self.checkpoint.files[name], self._buffer)
        return self._open[name]


def manifest_hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def checkpoint_folders(folder: Path) -> list[Path]:
    """Checkpoint folders, complete or not, oldest first."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of)
