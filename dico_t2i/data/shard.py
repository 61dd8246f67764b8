"""The index of one shard: the offset, size and checksum of each member of each sample.

Beside ``shard-000000.tar`` is its index, ``shard-000000.tar.index`` (safetensors). With it a sample is read by
position, without reading the tar from its start.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dico_t2i.data.errors import ShardError
from dico_t2i.data.tar import CHUNK, compression, divide_again, split_name, tar_members, why_left_out
from dico_t2i.files import write_atomically

Kind = Literal["images", "latents"]


Shapes = tuple[tuple[int, int], ...]  # height and width in pixels of each bucket

_Place = tuple[int, int, int]  # offset, size, crc32
_Sample = tuple[str, dict[str, _Place]]  # key, and places by extension


class _Member(NamedTuple):
    """A member with its key and extension; place is None if its data is incomplete."""

    name: tuple[str, str]
    place: _Place | None


MOMENTS = "moments.npy"
VERSION = 1  # of indexes


class ShardSummary(NamedTuple):
    """The counts of a shard. bucket: int16 (samples,), or None; all others are those of ``ShardIndex``."""

    samples: int
    extensions: tuple[str, ...]
    tar_bytes: int
    damage: tuple[str, ...]
    bucket: np.ndarray | None
    shapes: Shapes

    @staticmethod
    def load(path: Path) -> ShardSummary:
        """Read the header of a shard's index, and the buckets. Raises ShardError."""
        with _reading(path) as file:
            about = _About.read(file.metadata())
            samples, _ = file.get_slice("offsets").get_shape()
            bucket = file.get_tensor("bucket") if "bucket" in file.keys() else None  # noqa: SIM118
            return ShardSummary(samples, about.extensions, about.tar_bytes, about.damage, bucket, about.shapes)


@dataclass(frozen=True)
class ShardIndex:
    """The members of one shard of n samples.

    extensions: E names such as ``jpg`` or ``moments.npy``. offsets, sizes, crc32: int64 (n, E), the first two in bytes;
    -1 if a sample lacks that extension. key_bytes: uint8, all keys concatenated. key_bounds: int64 (n + 1,), the bounds
    of the keys. tar_bytes: the size of the tar. damage: one line for each place of the tar that cannot be read. bucket:
    int16 (n,), the index of each sample's shape in the data set's ``buckets``, if they were assigned. shapes: the
    height and width of these buckets, if ``assign_buckets`` chose among them. left_out: the reason and name of each
    member that does not belong to a sample; known after indexing, but not saved.
    """

    extensions: tuple[str, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    crc32: np.ndarray
    key_bytes: np.ndarray
    key_bounds: np.ndarray
    tar_bytes: int
    damage: tuple[str, ...] = ()
    bucket: np.ndarray | None = None
    shapes: Shapes = ()
    left_out: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.offsets)

    def key(self, member: int) -> str:
        low, high = self.key_bounds[member], self.key_bounds[member + 1]
        return self.key_bytes[low:high].tobytes().decode("utf-8", "replace")

    def save(self, path: Path) -> None:
        """Write to ``path``, atomically."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        if self.bucket is not None:
            arrays["bucket"] = self.bucket
        meta = {
            "version": str(VERSION),
            "extensions": json.dumps(self.extensions),
            "tar_bytes": str(self.tar_bytes),
            "damage": json.dumps(self.damage),
            **({"shapes": json.dumps(self.shapes)} if self.shapes else {}),
        }
        write_atomically(path, save(arrays, metadata=meta))

    @staticmethod
    def load(path: Path) -> ShardIndex:
        """Read what ``save`` wrote. Raises ShardError if it is missing, damaged or of a newer version."""
        with _reading(path) as file:
            names = [*_ARRAYS, "bucket"] if "bucket" in file.keys() else _ARRAYS  # noqa: SIM118
            arrays = {name: file.get_tensor(name) for name in names}
            index = ShardIndex(**arrays, **_About.read(file.metadata())._asdict())
        index._check(path)
        return index

    @property
    def summary(self) -> ShardSummary:
        return ShardSummary(len(self), self.extensions, self.tar_bytes, self.damage, self.bucket, self.shapes)

    def _check(self, path: Path) -> None:
        table = (self.offsets, self.sizes, self.crc32)
        good = self.offsets.ndim == 2 and all(a.shape == (len(self), len(self.extensions)) for a in table)
        good = good and all(a.dtype == np.int64 for a in (*table, self.key_bounds)) and self.key_bytes.dtype == np.uint8
        good = good and self.key_bounds.shape == (len(self) + 1,) and self.key_bytes.ndim == 1
        if not good or not self._within_bounds():
            raise ShardError(f"{path}: inconsistent shard index; {rebuild_remedy(path.parent)}")

    def _within_bounds(self) -> bool:
        lowest, bounds = -1 if self.offsets.size else 0, self.key_bounds
        low = all(a.min(initial=0) >= lowest for a in (self.offsets, self.sizes))
        inside = low and self.sizes.max(initial=0) <= self.tar_bytes
        inside = inside and bool(np.all(self.offsets <= self.tar_bytes - self.sizes))  # a sum could overflow
        keys = bounds[0] == 0 and bounds[-1] == len(self.key_bytes) and bool(np.all(bounds[1:] >= bounds[:-1]))
        buckets = self.bucket is None or (self.bucket.shape == (len(self),) and self.bucket.dtype == np.int16)
        return inside and keys and buckets


class _About(NamedTuple):
    """The metadata of a shard's index."""

    extensions: tuple[str, ...]
    tar_bytes: int
    damage: tuple[str, ...]
    shapes: Shapes

    @staticmethod
    def read(found: dict[str, str] | None) -> _About:
        """Raises KeyError, ValueError or TypeError."""
        meta = found or {}
        if (version := int(meta["version"])) != VERSION:
            raise ValueError(f"index version {version}, expected {VERSION}")
        shapes = json.loads(meta.get("shapes", "[]"))
        return _About(
            tuple(map(str, json.loads(meta["extensions"]))),
            int(meta["tar_bytes"]),
            tuple(json.loads(meta["damage"])),
            tuple((int(height), int(width)) for height, width in shapes),
        )


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Open a shard's index. Raises ShardError if that fails, or if reading from it does."""
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise ShardError(f"{path}: not a readable shard index ({error}); {rebuild_remedy(path.parent)}") from None


_ARRAYS = ("offsets", "sizes", "crc32", "key_bytes", "key_bounds")


def index_shard(tar_path: str | Path) -> ShardIndex:
    """Read a tar once and index its samples; only regular files with plain relative names are members of samples.

    A member's key is its name up to the first dot of the base name, and its extension is the rest, in lower case.
    Neighbours with the same key make a sample (webdataset's rule), unless ``divide_again`` finds dots in their keys.
    Unreadable parts are skipped and listed in ``damage``, and members that do not belong to a sample in ``left_out``. A
    sample with an incomplete member is left out. Raises ShardError if the file cannot be opened or is compressed.
    """
    tar_path = Path(tar_path)
    damage: list[str] = []
    left_out: list[tuple[str, str]] = []
    samples: list[_Sample] = []
    neighbours: list[_Member] = []
    try:
        with tar_path.open("rb") as file:
            if program := compression(file):
                raise ShardError(f"{tar_path}: is compressed ({program}); unpack it, since shards are read by position")
            for info, whole in tar_members(file, damage):
                reason, name = why_left_out(info), split_name(info.name)
                if reason is not None or name is None:
                    left_out += [] if info.isdir() else [(str(reason), info.name)]
                    continue
                if neighbours and neighbours[0].name[0] != name[0]:
                    samples += _samples_of(neighbours)
                    neighbours = []
                crc = _crc32(file, info.offset_data, info.size) if whole else 0
                neighbours.append(_Member(name, (info.offset_data, info.size, crc) if whole else None))
            tar_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ShardError(f"{tar_path}: cannot be read: {error}") from error
    return _to_arrays([*samples, *_samples_of(neighbours)], tar_bytes, damage, left_out)


def _samples_of(neighbours: Sequence[_Member]) -> list[_Sample]:
    """The samples of members with one key; a repeated extension starts a new one, an incomplete member removes its."""
    samples: list[_Sample] = []
    names = divide_again([member.name for member in neighbours])
    for (key, extension), member in zip(names, neighbours, strict=True):
        if not samples or samples[-1][0] != key or extension in samples[-1][1]:
            samples.append((key, {}))
        if member.place is None:
            samples.pop()
        else:
            samples[-1][1][extension] = member.place
    return samples


def _to_arrays(
    samples: list[_Sample], tar_bytes: int, damage: list[str], left_out: list[tuple[str, str]]
) -> ShardIndex:
    extensions = tuple(sorted({name for _, members in samples for name in members}))
    table = np.full((len(samples), len(extensions), 3), -1, dtype=np.int64)
    for row, (_, members) in enumerate(samples):
        for name, entry in members.items():
            table[row, extensions.index(name)] = entry
    keys = [key.encode("utf-8", "surrogateescape") for key, _ in samples]
    bounds = np.cumsum([0, *map(len, keys)], dtype=np.int64)
    offsets, sizes, crc32 = np.ascontiguousarray(table.transpose(2, 0, 1))
    joined = np.frombuffer(b"".join(keys), dtype=np.uint8)
    return ShardIndex(
        extensions, offsets, sizes, crc32, joined, bounds, tar_bytes, tuple(damage), left_out=tuple(left_out)
    )


def index_path(tar: Path) -> Path:
    """The index that belongs to a shard."""
    return tar.with_name(tar.name + ".index")


def _crc32(file: BinaryIO, offset: int, size: int) -> int:
    crc = 0
    for start in range(offset, offset + size, CHUNK):
        crc = zlib.crc32(os.pread(file.fileno(), min(CHUNK, offset + size - start), start), crc)
    return crc


def rebuild_remedy(root: Path) -> str:
    return f"index the folder again: python -m dico_t2i.data {root}"
