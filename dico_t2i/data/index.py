"""What is in the shards: where each member of each sample lies, how long it is, and its checksum.

A dataset is a folder of plain tars in webdataset's layout. Beside ``shard-000000.tar`` lies
``shard-000000.tar.index`` (safetensors), and one ``index.json`` names the shards, their sample counts and the
dataset's meta data. With them a sample is read by position, without walking the tar.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from logging import getLogger
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dico_t2i.data.quarantine import Quarantine, quarantined_samples, read_quarantine
from dico_t2i.files import flush, temporary, write_atomically

Kind = Literal["images", "latents"]
MOMENTS = "moments.npy"
VERSION = 1

_CHUNK = 1 << 24
_MAX_EXTRA_HEADER = 1 << 20  # bytes of a long name or of PAX fields; more is no name
_log = getLogger(__name__)


class DataError(ValueError):
    """Data that cannot be used; the message says what, where and what to do."""


class ShardError(DataError):
    """A shard, or its index, that cannot be read."""


@dataclass(frozen=True)
class ShardIndex:
    """The members of one shard of n samples.

    extensions: E names such as ``jpg`` or ``moments.npy``. offsets, sizes, crc32: int64 (n, E), the first two
    in bytes; -1 where a sample lacks that extension. key_bytes: uint8, all keys joined; key_bounds: int64
    (n + 1,). tar_bytes: size of the tar. damage: one line for each place of the tar that could not be read. bucket:
    int16 (n,), the number of each sample's shape in the dataset's ``buckets``, if they were assigned.
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
        }
        write_atomically(path, save(arrays, metadata=meta))

    @staticmethod
    def load(path: Path) -> ShardIndex:
        """Read what ``save`` wrote. Raises ShardError if it is missing, damaged or of a newer version."""
        try:
            with safe_open(path, framework="numpy") as file:
                meta = file.metadata() or {}
                names = [*_ARRAYS, "bucket"] if "bucket" in file.keys() else _ARRAYS  # noqa: SIM118
                arrays = {name: file.get_tensor(name) for name in names}
            index = ShardIndex(
                **arrays,
                extensions=tuple(map(str, json.loads(meta["extensions"]))),
                tar_bytes=int(meta["tar_bytes"]),
                damage=tuple(json.loads(meta["damage"])),
            )
            version = int(meta["version"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
            raise ShardError(f"{path}: not a readable shard index ({error}); {_remedy(path.parent)}") from None
        if version != VERSION:
            raise ShardError(f"{path}: index version {version}, expected {VERSION}; {_remedy(path.parent)}")
        index._check(path)
        return index

    def _check(self, path: Path) -> None:
        table = (self.offsets, self.sizes, self.crc32)
        good = self.offsets.ndim == 2 and all(a.shape == (len(self), len(self.extensions)) for a in table)
        good = good and all(a.dtype == np.int64 for a in (*table, self.key_bounds)) and self.key_bytes.dtype == np.uint8
        good = good and self.key_bounds.shape == (len(self) + 1,) and self.key_bytes.ndim == 1
        if not good or not self._within_bounds():
            raise ShardError(f"{path}: inconsistent shard index; {_remedy(path.parent)}")

    def _within_bounds(self) -> bool:
        lowest, bounds = -1 if self.offsets.size else 0, self.key_bounds
        low = all(a.min(initial=0) >= lowest for a in (self.offsets, self.sizes))
        inside = low and self.sizes.max(initial=0) <= self.tar_bytes
        inside = inside and bool(np.all(self.offsets <= self.tar_bytes - self.sizes))  # a sum could wrap
        keys = bounds[0] == 0 and bounds[-1] == len(self.key_bytes) and bool(np.all(bounds[1:] >= bounds[:-1]))
        buckets = self.bucket is None or (self.bucket.shape == (len(self),) and self.bucket.dtype == np.int16)
        return inside and keys and buckets


_ARRAYS = ("offsets", "sizes", "crc32", "key_bytes", "key_bounds")


@dataclass(frozen=True)
class DatasetIndex:
    """A folder of shards: names, samples and bytes of each, the dataset's meta data, and what it leaves out."""

    root: Path
    kind: Kind
    names: tuple[str, ...]
    samples: np.ndarray  # int64 (shards,)
    bytes: np.ndarray  # int64 (shards,)
    meta: dict[str, Any]
    bucket_counts: np.ndarray | None = None  # int64 (shards, buckets): samples of each of the meta data's ``buckets``
    quarantine: Quarantine = field(default_factory=dict)

    def __len__(self) -> int:
        """Samples in all shards."""
        return int(self.samples.sum())

    @property
    def location(self) -> str:
        """Where the data come from, for messages."""
        return str(self.root)

    @property
    def quarantined(self) -> int:
        """Samples that are left out."""
        return quarantined_samples(self.quarantine, self.samples.tolist())

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """Height and width in pixels of each bucket; none where they were not assigned."""
        return [(int(height), int(width)) for height, width in self.meta.get("buckets", ())]

    @property
    def starts(self) -> list[int]:
        """The first shard of each source; there is one."""
        return [0]

    def path(self, shard: int) -> Path:
        return self.root / self.names[shard]

    def shard(self, shard: int) -> ShardIndex:
        """The members of a shard, read from disk. Raises ShardError."""
        return ShardIndex.load(index_path(self.path(shard)))

    def open(self, shard: int) -> BinaryIO:
        """The tar, unbuffered. Raises OSError or ShardError."""
        return self.path(shard).open("rb", buffering=0)


def load_index(root: str | Path) -> DatasetIndex:
    """The index of a dataset folder, built first if there is none.

    Raises DataError if the folder is missing or holds no samples, ShardError if shards are missing or
    changed.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such data folder; give the folder that holds the shards (*.tar)")
    if not (root / "index.json").exists():
        return write_index(root)
    index = read_index(root)
    _check_sizes(index)
    return index


def write_index(
    root: str | Path,
    kind: Kind | None = None,
    meta: Mapping[str, Any] | None = None,
    *,
    rebuild: bool = False,
) -> DatasetIndex:
    """Index every shard of a folder and write ``index.json``.

    Shards whose own index fits the tar's size are not read again, unless ``rebuild``. Without ``kind`` it is
    taken from the members' names. A damaged shard is indexed as far as it can be read, with a warning; its
    entry in ``index.json`` says where. Raises DataError if there are no samples.
    """
    root = Path(root)
    tars = sorted(root.glob("*.tar"))
    if not tars:
        raise DataError(f"{root}: no shards (*.tar) in this folder")
    stale = [tar for tar in tars if rebuild or not _is_indexed(tar)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        show_progress(pool.map(_index_and_save, stale), len(stale), "indexing shards")
    buckets = len((meta or {}).get("buckets", ()))
    entries: list[dict[str, Any]] = []
    found: set[str] = set()
    for tar in tars:
        shard = ShardIndex.load(index_path(tar))
        entries.append(_entry(tar, shard, buckets))
        found.update(shard.extensions)
    if not any(entry["samples"] for entry in entries):
        damage = "; ".join(entries[0].get("damage", ()))
        raise DataError(f"{root}: no samples in its {len(tars)} shards; {damage or 'the tars are empty'}")
    if kind is None:
        kind = "latents" if MOMENTS in found else "images"
    content = {"version": VERSION, "kind": kind, "shards": entries, "meta": dict(meta or {})}
    write_atomically(root / "index.json", (json.dumps(content, indent=1) + "\n").encode())
    return read_index(root)


def rebuild_index(root: str | Path) -> DatasetIndex:
    """Index every shard anew, keeping the kind and the meta data that ``index.json`` gives."""
    root = Path(root)
    kind, meta = None, None
    if (root / "index.json").exists():
        with suppress(DataError):
            known = read_index(root)
            kind, meta = known.kind, known.meta
    return write_index(root, kind, meta, rebuild=True)


def index_shard(tar_path: str | Path) -> ShardIndex:
    """Read a tar once and index its samples; only regular files with plain relative names count.

    A member's key is its name up to the first dot of the base name, its extension the rest, in lower case;
    neighbours with one key make a sample (webdataset's rule). Unreadable stretches are skipped and listed in
    ``damage``; a sample with a cut member is left out. Raises ShardError if the file cannot be opened.
    """
    tar_path = Path(tar_path)
    damage: list[str] = []
    samples: list[tuple[str, dict[str, tuple[int, int, int]]]] = []
    try:
        with tar_path.open("rb") as file:
            for info, whole in _members(file, damage):
                name = _split_name(info.name)
                if name is None or not info.isreg() or info.issparse():
                    continue
                key, extension = name
                if not samples or samples[-1][0] != key or extension in samples[-1][1]:
                    samples.append((key, {}))
                if not whole:
                    samples.pop()
                    continue
                crc = _crc32(file, info.offset_data, info.size)
                samples[-1][1][extension] = (info.offset_data, info.size, crc)
            tar_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ShardError(f"{tar_path}: cannot be read: {error}") from error
    return _to_arrays(samples, tar_bytes, damage)


class ShardFile:
    """One shard being written: a temporary file until ``commit``, then the tar and its index, both complete.

    The bytes depend on the samples alone (no times, users or groups).
    """

    def __init__(self, path: str | Path) -> None:
        from webdataset.writer import TarWriter

        self.path = Path(path)
        self._part = temporary(self.path)
        self._file = self._part.open("xb")
        self._tar = TarWriter(self._file, user="", group="", mtime=0, encoder=False)
        self._last_key = ""
        self._buckets: list[int] = []
        self.samples = 0
        self.bytes = 0  # of the members, without headers

    def write(self, sample: Mapping[str, Any]) -> None:
        """Add a sample: ``__key__`` and, by extension, bytes, text, integers, arrays or JSON objects.

        ``__bucket__``, if given for all samples, goes to the index. Raises DataError for a key or extension that
        would not be read back as given.
        """
        members = {name: _encode(value) for name, value in sample.items() if not name.startswith("__")}
        key = str(sample.get("__key__", ""))
        for extension in members:
            if _split_name(f"{key}.{extension}") != (key, extension):
                raise DataError(f"{self.path}: {key!r} with extension {extension!r} is not a sample's name")
        if not members or key == self._last_key:
            raise DataError(f"{self.path}: sample {key!r} is {'repeated' if members else 'empty'}")
        self._tar.write({"__key__": key, **members})
        self._last_key = key
        if "__bucket__" in sample:
            self._buckets.append(int(sample["__bucket__"]))
        self.samples += 1
        self.bytes += sum(map(len, members.values()))

    def commit(self) -> ShardIndex:
        """Finish the tar, index it, and give both their names."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = index_shard(self._part)
        if index.damage or len(index) != self.samples:
            raise ShardError(f"{self.path}: not read back as written; {'; '.join(index.damage)}")
        if self._buckets:
            if len(self._buckets) != self.samples:
                raise DataError(f"{self.path}: {len(self._buckets)} of {self.samples} samples have a __bucket__")
            index = replace(index, bucket=np.array(self._buckets, np.int16))
        index.save(index_path(self.path))
        self._part.replace(self.path)
        flush(self.path.parent)
        return index

    def discard(self) -> None:
        """Throw away what was written."""
        with suppress(OSError):  # a full disk, for one
            self._tar.close()
        self._file.close()
        self._part.unlink(missing_ok=True)


class ShardWriter:
    """Writes samples into numbered shards of a new folder, and ``index.json`` at the end.

    A context manager: after an exception the unfinished shard is dropped and there is no ``index.json``.
    Raises DataError if the folder holds shards already.
    """

    def __init__(
        self,
        root: str | Path,
        samples_per_shard: int = 1000,
        kind: Kind = "images",
        meta: Mapping[str, Any] | None = None,
        max_bytes: int = 1 << 30,
    ) -> None:
        if kind not in get_args(Kind) or samples_per_shard < 1:
            raise DataError(f"kind {kind!r} with {samples_per_shard} samples per shard cannot be written")
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        if any(self.root.glob("*.tar")) or (self.root / "index.json").exists():
            raise DataError(f"{self.root}: holds shards already; choose another folder or remove this one")
        self.samples_per_shard, self.kind, self.max_bytes = samples_per_shard, kind, max_bytes
        self.meta = dict(meta or {})
        self.samples = 0
        self._shards = 0
        self._open: ShardFile | None = None

    def write(self, sample: Mapping[str, Any]) -> None:
        """Add a sample, as ``ShardFile.write`` takes it; starts a new shard when one is full."""
        if self._open is None:
            self._open = ShardFile(self.root / f"shard-{self._shards:06d}.tar")
            self._shards += 1
        self._open.write(sample)
        self.samples += 1
        if self._open.samples >= self.samples_per_shard or self._open.bytes >= self.max_bytes:
            self._commit()

    def close(self) -> DatasetIndex:
        """Finish the last shard and write ``index.json``. Raises DataError if nothing was written."""
        self._commit()
        return write_index(self.root, self.kind, self.meta)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._open is not None:
            self._open.discard()

    def _commit(self) -> None:
        if self._open is not None:
            self._open.commit()
        self._open = None


_EXTRA_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _TarInfo(tarfile.TarInfo):
    """Refuses long names and PAX fields that claim too much, before they are read into memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTRA_HEADERS and not 0 <= self.size <= _MAX_EXTRA_HEADER:
            raise tarfile.InvalidHeaderError(  # type: ignore[attr-defined]
                f"an extended header of {self.size} bytes"
            )
        return super()._proc_member(tar)  # type: ignore[misc]


def _members(file: BinaryIO, damage: list[str]) -> Iterator[tuple[tarfile.TarInfo, bool]]:
    """The tar's members with whether their data is whole. Appends to ``damage`` what could not be read."""
    size = os.fstat(file.fileno()).st_size
    end = 0
    try:
        # Reading on behind zeros and bad headers finds what lies beyond a damaged stretch.
        tar = tarfile.open(fileobj=file, mode="r:", ignore_zeros=True, tarinfo=_TarInfo)  # noqa: SIM115
        while (info := tar.next()) is not None:
            if info.size < 0 or info.offset < end:
                raise tarfile.ReadError("impossible size in a header")
            if _any_nonzero(file, end, info.offset):
                damage.append(f"bytes {end} to {info.offset}: no tar members")
            whole = info.offset_data + info.size <= size
            if not whole:
                damage.append(f"byte {info.offset}: {info.name!r} is cut")
            yield info, whole
            if not whole:
                return
            end = tar.offset
    except OSError:
        raise
    except Exception as error:  # a hostile header makes tarfile raise nearly anything
        damage.append(f"byte {end}: {error}")
        return
    if size < end + tarfile.BLOCKSIZE:
        damage.append(f"byte {end}: no end mark; the file may be cut")
    elif _any_nonzero(file, end, size):
        damage.append(f"bytes {end} to {size}: no tar members")


def _split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member's name; None if it is no sample's, or reaches out of the folder."""
    name = name.removeprefix("./")
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension or name.startswith("/") or ".." in folder.split("/"):
        return None
    return folder + slash + stem, extension.lower()


def _to_arrays(
    samples: list[tuple[str, dict[str, tuple[int, int, int]]]], tar_bytes: int, damage: list[str]
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
    return ShardIndex(extensions, offsets, sizes, crc32, joined, bounds, tar_bytes, tuple(damage))


def _is_indexed(tar: Path) -> bool:
    try:
        return ShardIndex.load(index_path(tar)).tar_bytes == tar.stat().st_size
    except ShardError:
        return False


def _index_and_save(tar: Path) -> None:
    shard = index_shard(tar)
    for place in shard.damage:
        _log.warning("%s: damaged at %s; %d samples can be read", tar, place, len(shard))
    with suppress(ShardError):
        known = ShardIndex.load(index_path(tar))
        if np.array_equal(known.key_bytes, shard.key_bytes) and np.array_equal(known.key_bounds, shard.key_bounds):
            shard = replace(shard, bucket=known.bucket)
    shard.save(index_path(tar))


def _entry(tar: Path, shard: ShardIndex, buckets: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": tar.name, "samples": len(shard), "bytes": shard.tar_bytes}
    if buckets and shard.bucket is not None:
        if shard.bucket.min(initial=0) < 0 or shard.bucket.max(initial=0) >= buckets:
            raise ShardError(f"{index_path(tar)}: has buckets beyond the {buckets} of the data set; assign them anew")
        entry["buckets"] = np.bincount(shard.bucket, minlength=buckets).tolist()
    return {**entry, "damage": list(shard.damage)} if shard.damage else entry


def read_index(root: Path) -> DatasetIndex:
    """What ``index.json`` of a folder says, without a look at the shards. Raises DataError."""
    path = root / "index.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, kind, shards = content["version"], content["kind"], content["shards"]
        names = tuple(str(shard["name"]) for shard in shards)
        samples = np.array([int(shard["samples"]) for shard in shards], dtype=np.int64)
        sizes = np.array([int(shard["bytes"]) for shard in shards], dtype=np.int64)
        meta = dict(content["meta"])
        counts = _bucket_counts(shards, meta)
    except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: not a readable dataset index ({error!r}); {_remedy(root)}") from None
    if version != VERSION or kind not in get_args(Kind):
        raise DataError(f"{path}: version {version!r}, kind {kind!r} is not known here; {_remedy(root)}")
    problem = _problem(names, samples, sizes, counts)
    if problem:
        raise DataError(f"{path}: {problem}; {_remedy(root)}")
    try:
        quarantine = read_quarantine(root, names)
    except ValueError as error:
        raise DataError(str(error)) from None
    return DatasetIndex(root, kind, names, samples, sizes, meta, counts, quarantine)


def _bucket_counts(shards: list[dict[str, Any]], meta: dict[str, Any]) -> np.ndarray | None:
    """int64 (shards, buckets); None unless the buckets of all shards are known. Raises ValueError for odd shapes."""
    shapes = [(int(height), int(width)) for height, width in meta.get("buckets", ())]
    if not shapes or not all("buckets" in shard for shard in shards):
        return None
    return np.array([shard["buckets"] for shard in shards], dtype=np.int64).reshape(len(shards), len(shapes))


def _problem(names: tuple[str, ...], samples: np.ndarray, sizes: np.ndarray, counts: np.ndarray | None) -> str | None:
    """What cannot be in an index."""
    outside = next((name for name in names if Path(name).name != name), None)
    if outside is not None:
        return f"shard name {outside!r}"
    if len(set(names)) != len(names):
        return "a shard name stands there twice"
    if min(samples.min(initial=0), sizes.min(initial=0)) < 0 or (samples > sizes).any():
        return "impossible numbers of samples or bytes"
    if counts is not None and not (counts.min(initial=0) >= 0 and np.array_equal(counts.sum(1), samples)):
        return "numbers of samples in buckets that do not add up"
    return None if samples.sum() else "no samples"


def _check_sizes(index: DatasetIndex) -> None:
    found = {entry.name: entry.stat().st_size for entry in os.scandir(index.root) if entry.name.endswith(".tar")}
    wrong = [
        f"{name} ({found.get(name, 'missing')}, indexed {size} bytes)"
        for name, size in zip(index.names, index.bytes.tolist(), strict=True)
        if found.get(name) != size
    ]
    if wrong:
        some = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ShardError(f"{index.root}: shards differ from their index: {some}; {_remedy(index.root)}")


def _remedy(root: Path) -> str:
    return f"index the folder anew: python -m dico_t2i.data {root}"


def index_path(tar: Path) -> Path:
    """The index that belongs to a shard."""
    return tar.with_name(tar.name + ".index")


def _encode(value: Any) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, np.ndarray):
        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=False)
        return buffer.getvalue()
    if isinstance(value, str | int | np.integer):
        return str(value).encode()
    return json.dumps(value, ensure_ascii=False).encode()


def _crc32(file: BinaryIO, offset: int, size: int) -> int:
    crc = 0
    for start in range(offset, offset + size, _CHUNK):
        crc = zlib.crc32(os.pread(file.fileno(), min(_CHUNK, offset + size - start), start), crc)
    return crc


def _any_nonzero(file: BinaryIO, start: int, stop: int) -> bool:
    chunks = (os.pread(file.fileno(), min(_CHUNK, stop - at), at) for at in range(start, stop, _CHUNK))
    return any(chunk.count(0) != len(chunk) for chunk in chunks)


def show_progress(work: Iterable[None], total: int, what: str) -> None:
    """Wait for all of ``work``, with a progress bar if there is more than one piece."""
    from rich.progress import track

    for _ in track(work, what, total=total, transient=True, disable=total < 2):
        pass
