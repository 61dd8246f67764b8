"""The index of a data set: the offset, size and checksum of each member of each sample.

A data set is a folder of plain tars in webdataset's layout. Beside ``shard-000000.tar`` is its index,
``shard-000000.tar.index`` (safetensors); ``index.json`` lists the shards, their numbers of samples and the metadata of
the data set. With these files a sample is read by position, without reading the tar from its start.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from logging import getLogger
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, get_args

import numpy as np

from dico_t2i.data.errors import DataError, ShardError
from dico_t2i.data.names import Names
from dico_t2i.data.quarantine import Quarantine, quarantined_samples, read_quarantine
from dico_t2i.data.shard import (
    MOMENTS,
    VERSION,
    Kind,
    Shapes,
    ShardIndex,
    ShardSummary,
    index_path,
    index_shard,
    rebuild_remedy,
)
from dico_t2i.data.table import Table, load_table, save_table
from dico_t2i.data.tar import PACKED
from dico_t2i.files import write_atomically

_log = getLogger(__name__)

_TELL_S = 30.0  # between two lines about progress in a log
_STATS = 1000  # sizes of tars that a thread asks for in one go

Part = tuple[int, int]  # k, n: every n-th shard, starting at shard k
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class DatasetIndex:
    """A folder of shards: the name, number of samples and bytes of each, the metadata, and the quarantine list."""

    root: Path
    kind: Kind
    names: Names
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
        return quarantined_samples(self.quarantine, self.samples)

    @property
    def table(self) -> Table:
        """The content of ``index.json``."""
        return Table(self.kind, self.names, self.samples, self.bytes, self.meta, self.bucket_counts)

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


def load_index(root: str | Path, *, check: bool = True) -> DatasetIndex:
    """The index of a data set's folder, which is built first if there is none.

    check: whether the sizes of all shards are compared with the index, which takes a while on a network file system:
    one of the processes that start together should do it. Raises DataError if the folder is missing or holds no
    samples, and ShardError if shards are missing or have changed.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such data folder; give the folder that holds the shards (*.tar)")
    if not (root / "index.json").exists():
        return write_index(root)
    index = read_index(root)
    if check:
        _check_sizes(index)
    return index


def write_index(
    root: str | Path,
    kind: Kind | None = None,
    meta: Mapping[str, Any] | None = None,
    *,
    rebuild: bool = False,
    check: bool = True,
) -> DatasetIndex:
    """Index every shard of a folder and write ``index.json``.

    Shards whose own index has the tar's size are not read again, unless ``rebuild`` is set. check: whether these
    indexes are read completely, or only their headers. Without ``kind``, the kind is derived from the members' names. A
    damaged shard is indexed as far as it can be read, with a warning, and its entry in ``index.json`` lists the damage.
    Raises DataError if there are no samples.
    """
    root = Path(root)
    tars = _tars(root)
    return _write(root, tars, index_shards(tars, rebuild=rebuild, check=check), kind, meta)


def index_shards(tars: Sequence[Path], *, rebuild: bool = False, check: bool = True) -> list[ShardSummary]:
    """Write the own index of each shard that lacks one of its size; rebuild, check: as in ``write_index``.

    Returns the counts of each shard.
    """
    known: list[ShardSummary | None] = [None] * len(tars)
    if not rebuild:
        known = in_threads(partial(_fitting, check=check), tars, "reading the shards' indexes")
    made = iter(in_threads(_indexed, [t for t, fits in zip(tars, known, strict=True) if not fits], "indexing shards"))
    return [fits or next(made) for fits in known]


def part_of(root: Path, part: Part) -> list[Path]:
    """The shards of a part of the work on a folder."""
    return _tars(root)[part[0] :: part[1]]


def join_parts(root: Path, shapes: Shapes = ()) -> DatasetIndex | None:
    """Write ``index.json`` if each shard of the folder has its own index; None if some are left for other parts.

    Only the headers of these indexes are read. shapes: if given, the buckets that all samples must have been assigned
    to. The kind and the metadata of an existing ``index.json`` are kept.
    """
    tars, there = _tars(root), {entry.name for entry in os.scandir(root)}
    if not all(index_path(tar).name in there for tar in tars):
        return None
    summaries = []
    for summary in in_threads(_fitting, tars, "reading the shards' indexes"):
        if summary is None or (shapes and summary.shapes != shapes):
            return None
        summaries.append(summary)
    kind, meta = _known(root)
    buckets = {"buckets": [list(shape) for shape in shapes]} if shapes else {}
    return _write(root, tars, summaries, kind, {**meta, **buckets})


def _tars(root: Path) -> list[Path]:
    tars = sorted(root.glob("*.tar"))
    if not tars:
        packed = sorted(path.name for path in root.glob("*.t*") if path.name.endswith(PACKED))
        cause = f"; {len(packed)} are compressed, such as {packed[0]}: unpack them" if packed else ""
        raise DataError(f"{root}: no shards (*.tar) in this folder{cause}")
    return tars


def _write(
    root: Path,
    tars: Sequence[Path],
    summaries: Sequence[ShardSummary],
    kind: Kind | None,
    meta: Mapping[str, Any] | None,
) -> DatasetIndex:
    """Write ``index.json`` for these shards."""
    buckets = len((meta or {}).get("buckets", ()))
    entries = [_entry(tar, summary, buckets) for tar, summary in zip(tars, summaries, strict=True)]
    found = set(chain.from_iterable(summary.extensions for summary in summaries))
    if not any(entry["samples"] for entry in entries):
        causes = [*entries[0].get("damage", ()), *_left_out(index_shard(tars[0]))]
        raise DataError(f"{root}: no samples in its {len(tars)} shards; {'; '.join(causes) or 'the tars are empty'}")
    if kind is None:
        kind = "latents" if MOMENTS in found else "images"
    content = {"version": VERSION, "kind": kind, "shards": entries, "meta": dict(meta or {})}
    written = (json.dumps(content, indent=1) + "\n").encode()
    write_atomically(root / "index.json", written)
    save_table(_parsed(written), root, written)
    return read_index(root)


def rebuild_index(root: str | Path) -> DatasetIndex:
    """Index every shard again, and keep the kind and the metadata of ``index.json``."""
    kind, meta = _known(Path(root))
    return write_index(root, kind, meta, rebuild=True)


def _known(root: Path) -> tuple[Kind | None, dict[str, Any]]:
    """The kind and the metadata of ``index.json``; None and nothing without a usable one."""
    if (root / "index.json").exists():
        with suppress(DataError):
            known = read_index(root)
            return known.kind, known.meta
    return None, {}


def _fitting(tar: Path, check: bool = False) -> ShardSummary | None:
    """The counts of a shard if its own index can be read and has the tar's size; else None."""
    path = index_path(tar)
    try:
        summary = ShardIndex.load(path).summary if check else ShardSummary.load(path)
    except ShardError:
        return None
    return summary if summary.tar_bytes == tar.stat().st_size else None


def in_threads(work: Callable[[Item], Result], items: Sequence[Item], what: str) -> list[Result]:
    """The results of ``work`` on all items, in threads, with progress."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(progress(pool.map(work, items), len(items), what))


def _indexed(tar: Path) -> ShardSummary:
    """The counts of a shard after its index was written."""
    shard = index_shard(tar)
    for place in shard.damage:
        _log.warning("%s: damaged at %s; %d samples can be read", tar, place, len(shard))
    for line in _left_out(shard):
        _log.warning("%s: %s", tar, line)
    with suppress(ShardError):
        known = ShardIndex.load(index_path(tar))
        if np.array_equal(known.key_bytes, shard.key_bytes) and np.array_equal(known.key_bounds, shard.key_bounds):
            shard = replace(shard, bucket=known.bucket, shapes=known.shapes)
    shard.save(index_path(tar))
    return shard.summary


def _left_out(shard: ShardIndex) -> list[str]:
    """One line for each reason why members of a tar do not belong to a sample."""
    names: dict[str, list[str]] = {}
    for reason, name in shard.left_out:
        names.setdefault(reason, []).append(name)
    return [f"{len(found)} members left out: {reason}, such as {found[0]!r}" for reason, found in names.items()]


def _entry(tar: Path, shard: ShardSummary, buckets: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": tar.name, "samples": shard.samples, "bytes": shard.tar_bytes}
    if buckets and shard.bucket is not None:
        if shard.bucket.min(initial=0) < 0 or shard.bucket.max(initial=0) >= buckets:
            raise ShardError(f"{index_path(tar)}: has buckets beyond the {buckets} of the data set; assign them again")
        entry["buckets"] = np.bincount(shard.bucket, minlength=buckets).tolist()
    return {**entry, "damage": list(shard.damage)} if shard.damage else entry


def read_index(root: Path) -> DatasetIndex:
    """Read the index of a folder, without looking at the shards. Raises DataError."""
    path = root / "index.json"
    try:
        content = path.read_bytes()
        table = load_table(root, content) or _parsed(content)
    except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: not a readable index of a data set ({error!r}); {rebuild_remedy(root)}") from None
    if table.kind not in get_args(Kind):
        raise DataError(f"{path}: kind {table.kind!r} is unknown; {rebuild_remedy(root)}")
    problem = _problem(table)
    if problem:
        raise DataError(f"{path}: {problem}; {rebuild_remedy(root)}")
    try:
        quarantine = read_quarantine(root, table.names)
    except ValueError as error:
        raise DataError(str(error)) from None
    return DatasetIndex(root, quarantine=quarantine, **vars(table))


def _parsed(content: bytes) -> Table:
    """The content of an ``index.json``. Raises ValueError, KeyError or other errors if it is none."""
    found = json.loads(content)
    if (version := found["version"]) != VERSION:
        raise ValueError(f"version {version!r} is unknown")
    shards, meta = found["shards"], dict(found["meta"])
    samples, sizes = (np.array([int(shard[name]) for shard in shards], np.int64) for name in ("samples", "bytes"))
    names = Names.of(str(shard["name"]) for shard in shards)
    return Table(found["kind"], names, samples, sizes, meta, _bucket_counts(shards, meta))


def _bucket_counts(shards: list[dict[str, Any]], meta: dict[str, Any]) -> np.ndarray | None:
    """int64 (shards, buckets); None unless all shards have buckets. Raises ValueError for wrong shapes."""
    shapes = [(int(height), int(width)) for height, width in meta.get("buckets", ())]
    if not shapes or not all("buckets" in shard for shard in shards):
        return None
    return np.array([shard["buckets"] for shard in shards], dtype=np.int64).reshape(len(shards), len(shapes))


def _problem(table: Table) -> str | None:
    """The first impossible content of an index; None if there is none."""
    samples, sizes, counts = table.samples, table.bytes, table.bucket_counts
    if problem := table.names.problem():
        return problem
    if min(samples.min(initial=0), sizes.min(initial=0)) < 0 or (samples > sizes).any():
        return "impossible numbers of samples or bytes"
    if counts is not None and not (counts.min(initial=0) >= 0 and np.array_equal(counts.sum(1), samples)):
        return "the numbers of samples in the buckets do not add up"
    return None if samples.sum() else "no samples"


def _check_sizes(index: DatasetIndex) -> None:
    """Raise ShardError if a shard is missing or does not have the size that is in the index."""
    found = np.concatenate(in_threads(partial(_sizes, index), range(0, len(index.names), _STATS), "checking sizes"))
    wrong = np.flatnonzero(found != index.bytes).tolist()
    if wrong:
        told = {shard: "missing" if found[shard] < 0 else found[shard] for shard in wrong[:3]}
        some = ", ".join(f"{index.names[n]} ({size}, indexed {index.bytes[n]} bytes)" for n, size in told.items())
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ShardError(f"{index.root}: shards differ from their index: {some}{more}; {rebuild_remedy(index.root)}")


def _sizes(index: DatasetIndex, start: int) -> np.ndarray:
    """The sizes of ``_STATS`` tars in bytes; -1 for those that are missing."""
    return np.array([_size(f"{index.root}/{name}") for name in index.names[start : start + _STATS]])


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 (in a third of the time)
    except FileNotFoundError:
        return -1


def progress(work: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Yield from ``work``, with a progress bar if there is more than one item, or a line now and then in a log."""
    from rich.console import Console
    from rich.progress import track

    console, started, told = Console(), time.monotonic(), time.monotonic()
    tracked = track(work, what, total=total, console=console, transient=True, disable=total < 2)
    for done, item in enumerate(tracked, 1):
        yield item
        now = time.monotonic()
        if not console.is_terminal and now - told >= _TELL_S and done < total:
            told, left = now, (now - started) / done * (total - done)
            print(f"{what}: {done} of {total}, {left / 60:.0f} minutes left", flush=True)
