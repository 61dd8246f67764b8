"""The index of a data set: the offset, size and checksum of each member of each sample.

A data set is a folder of plain tars in webdataset's layout. Beside ``shard-000000.tar`` is its index,
``shard-000000.tar.index`` (safetensors); ``index.json`` lists the shards, their numbers of samples and the metadata of
the data set. With these files a sample is read by position, without reading the tar from its start.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from logging import getLogger
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np

from dico_t2i.data.errors import DataError, ShardError
from dico_t2i.data.quarantine import Quarantine, quarantined_samples, read_quarantine
from dico_t2i.data.shard import MOMENTS, VERSION, Kind, ShardIndex, index_path, index_shard, rebuild_remedy
from dico_t2i.data.tar import PACKED
from dico_t2i.files import write_atomically

_log = getLogger(__name__)

_TELL_S = 30.0  # between two lines about progress in a log


@dataclass(frozen=True)
class DatasetIndex:
    """A folder of shards: the name, number of samples and bytes of each, the metadata, and the quarantine list."""

    root: Path
    kind: Kind
    names: tuple[str, ...]
    samples: np.ndarray  # int64 (shards,)
    bytes: np.ndarray  # int64 (shards,)
    meta: dict[str, Any]
    bucket_counts: np.ndarray | None = None  # int64 (shards, buckets): samples in each of the metadata's ``buckets``
    quarantine: Quarantine = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of samples in all shards."""
        return int(self.samples.sum())

    @property
    def location(self) -> str:
        """The place of the data, for messages."""
        return str(self.root)

    @property
    def quarantined(self) -> int:
        """The number of samples in quarantine."""
        return quarantined_samples(self.quarantine, self.samples.tolist())

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """The height and width in pixels of each bucket; empty if buckets were not assigned."""
        return [(int(height), int(width)) for height, width in self.meta.get("buckets", ())]

    @property
    def starts(self) -> list[int]:
        """The first shard of each source; here there is only one source."""
        return [0]

    def path(self, shard: int) -> Path:
        return self.root / self.names[shard]

    def shard(self, shard: int) -> ShardIndex:
        """The members of a shard, read from disk. Raises ShardError."""
        return ShardIndex.load(index_path(self.path(shard)))

    def open(self, shard: int) -> BinaryIO:
        """Open the tar, unbuffered. Raises OSError or ShardError."""
        return self.path(shard).open("rb", buffering=0)


def load_index(root: str | Path) -> DatasetIndex:
    """The index of a data set's folder, which is built first if there is none.

    Raises DataError if the folder is missing or holds no samples, and ShardError if shards are missing or have changed.
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

    Shards whose own index has the tar's size are not read again, unless ``rebuild`` is set. Without ``kind``, the kind
    is derived from the members' names. A damaged shard is indexed as far as it can be read, with a warning, and its
    entry in ``index.json`` lists the damage. Raises DataError if there are no samples.
    """
    root = Path(root)
    tars = sorted(root.glob("*.tar"))
    if not tars:
        packed = sorted(path.name for path in root.glob("*.t*") if path.name.endswith(PACKED))
        cause = f"; {len(packed)} are compressed, such as {packed[0]}: unpack them" if packed else ""
        raise DataError(f"{root}: no shards (*.tar) in this folder{cause}")
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
        causes = [*entries[0].get("damage", ()), *_left_out(index_shard(tars[0]))]
        raise DataError(f"{root}: no samples in its {len(tars)} shards; {'; '.join(causes) or 'the tars are empty'}")
    if kind is None:
        kind = "latents" if MOMENTS in found else "images"
    content = {"version": VERSION, "kind": kind, "shards": entries, "meta": dict(meta or {})}
    write_atomically(root / "index.json", (json.dumps(content, indent=1) + "\n").encode())
    return read_index(root)


def rebuild_index(root: str | Path) -> DatasetIndex:
    """Index every shard again, and keep the kind and the metadata of ``index.json``."""
    root = Path(root)
    kind, meta = None, None
    if (root / "index.json").exists():
        with suppress(DataError):
            known = read_index(root)
            kind, meta = known.kind, known.meta
    return write_index(root, kind, meta, rebuild=True)


def _is_indexed(tar: Path) -> bool:
    try:
        return ShardIndex.load(index_path(tar)).tar_bytes == tar.stat().st_size
    except ShardError:
        return False


def _index_and_save(tar: Path) -> None:
    shard = index_shard(tar)
    for place in shard.damage:
        _log.warning("%s: damaged at %s; %d samples can be read", tar, place, len(shard))
    for line in _left_out(shard):
        _log.warning("%s: %s", tar, line)
    with suppress(ShardError):
        known = ShardIndex.load(index_path(tar))
        if np.array_equal(known.key_bytes, shard.key_bytes) and np.array_equal(known.key_bounds, shard.key_bounds):
            shard = replace(shard, bucket=known.bucket)
    shard.save(index_path(tar))


def _left_out(shard: ShardIndex) -> list[str]:
    """One line for each reason why members of a tar do not belong to a sample."""
    names: dict[str, list[str]] = {}
    for reason, name in shard.left_out:
        names.setdefault(reason, []).append(name)
    return [f"{len(found)} members left out: {reason}, such as {found[0]!r}" for reason, found in names.items()]


def _entry(tar: Path, shard: ShardIndex, buckets: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": tar.name, "samples": len(shard), "bytes": shard.tar_bytes}
    if buckets and shard.bucket is not None:
        if shard.bucket.min(initial=0) < 0 or shard.bucket.max(initial=0) >= buckets:
            raise ShardError(f"{index_path(tar)}: has buckets beyond the {buckets} of the data set; assign them again")
        entry["buckets"] = np.bincount(shard.bucket, minlength=buckets).tolist()
    return {**entry, "damage": list(shard.damage)} if shard.damage else entry


def read_index(root: Path) -> DatasetIndex:
    """Read ``index.json`` of a folder, without looking at the shards. Raises DataError."""
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
        raise DataError(f"{path}: not a readable index of a data set ({error!r}); {rebuild_remedy(root)}") from None
    if version != VERSION or kind not in get_args(Kind):
        raise DataError(f"{path}: version {version!r}, kind {kind!r} is unknown; {rebuild_remedy(root)}")
    problem = _problem(names, samples, sizes, counts)
    if problem:
        raise DataError(f"{path}: {problem}; {rebuild_remedy(root)}")
    try:
        quarantine = read_quarantine(root, names)
    except ValueError as error:
        raise DataError(str(error)) from None
    return DatasetIndex(root, kind, names, samples, sizes, meta, counts, quarantine)


def _bucket_counts(shards: list[dict[str, Any]], meta: dict[str, Any]) -> np.ndarray | None:
    """int64 (shards, buckets); None unless all shards have buckets. Raises ValueError for wrong shapes."""
    shapes = [(int(height), int(width)) for height, width in meta.get("buckets", ())]
    if not shapes or not all("buckets" in shard for shard in shards):
        return None
    return np.array([shard["buckets"] for shard in shards], dtype=np.int64).reshape(len(shards), len(shapes))


def _problem(names: tuple[str, ...], samples: np.ndarray, sizes: np.ndarray, counts: np.ndarray | None) -> str | None:
    """The first impossible content of an index; None if there is none."""
    outside = next((name for name in names if Path(name).name != name), None)
    if outside is not None:
        return f"the shard name {outside!r} is not a plain file name"
    if len(set(names)) != len(names):
        return "a shard name is listed twice"
    if min(samples.min(initial=0), sizes.min(initial=0)) < 0 or (samples > sizes).any():
        return "impossible numbers of samples or bytes"
    if counts is not None and not (counts.min(initial=0) >= 0 and np.array_equal(counts.sum(1), samples)):
        return "the numbers of samples in the buckets do not add up"
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
        raise ShardError(f"{index.root}: shards differ from their index: {some}; {rebuild_remedy(index.root)}")


def show_progress(work: Iterable[None], total: int, what: str) -> None:
    """Wait for all of ``work``, with a progress bar if there is more than one item, or a line now and then in a log."""
    from rich.console import Console
    from rich.progress import track

    console, started, told = Console(), time.monotonic(), time.monotonic()
    for done, _ in enumerate(track(work, what, total=total, console=console, transient=True, disable=total < 2), 1):
        now = time.monotonic()
        if not console.is_terminal and now - told >= _TELL_S and done < total:
            told, left = now, (now - started) / done * (total - done)
            print(f"{what}: {done} of {total}, {left / 60:.0f} minutes left", flush=True)
