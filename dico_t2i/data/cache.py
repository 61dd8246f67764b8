"""Reads shards at a URL through a cache: a local folder of limited size that the processes of a node share.

A copy appears only when it is complete: one process downloads it under a temporary name and compares its size with the
index, while the others wait for its lock. Before a download the least recently opened shards are deleted.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from dico_t2i.config import CacheConfig
from dico_t2i.data.errors import DataError, ShardError
from dico_t2i.data.index import DatasetIndex, read_index
from dico_t2i.data.quarantine import FILE as QUARANTINE
from dico_t2i.data.shard import ShardIndex, index_path
from dico_t2i.data.table import FILE as ARRAYS
from dico_t2i.data.table import save_table
from dico_t2i.files import temporary, write_atomically
from dico_t2i.remote import UrlError, download, patiently, read

GIGABYTE = 10**9


@dataclass(frozen=True)
class CachedIndex(DatasetIndex):
    """A data set at a URL. ``root`` is the folder of its local copies."""

    url: str = ""
    limit: int = 0  # the most bytes that the shards below the parent folder of ``root`` may have

    @property
    def location(self) -> str:
        return self.url

    def shard(self, shard: int) -> ShardIndex:
        path = index_path(self.path(shard))
        try:
            self._fetch(path, None).close()
            return ShardIndex.load(path)
        except ShardError:
            path.unlink(missing_ok=True)  # so that an incomplete copy is downloaded again
            raise

    def open(self, shard: int) -> BinaryIO:
        return self._fetch(self.path(shard), int(self.bytes[shard]))

    def _fetch(self, path: Path, size: int | None) -> BinaryIO:
        """Open a file of the cache, and download it first if it is missing. Raises OSError or ShardError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock")):
            with suppress(FileNotFoundError):
                if size in (None, path.stat().st_size):
                    os.utime(path)  # records its last use
                    return path.open("rb", buffering=0)
            for leftover in path.parent.glob(f".{path.name}.*.part"):  # from a process that was killed
                leftover.unlink(missing_ok=True)
            self._make_room(size or 0)
            part = temporary(path)
            try:
                download(f"{self.url}/{path.name}", part)
                found = part.stat().st_size
                if size not in (None, found):
                    raise ShardError(f"{self.url}/{path.name}: {found} bytes were downloaded, but the index has {size}")
                file = part.open("rb", buffering=0)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        self._make_room(0)  # others may have downloaded shards meanwhile
        return file

    def _make_room(self, size: int) -> None:
        """Delete the least recently used shards until ``size`` bytes fit; a process can still read one that is open."""
        with _locked(self.root.parent / ".lock"):
            shards = _shards(self.root.parent)
            total = size + sum(size for _, size, _ in shards)
            for _, used, files in shards:
                if total <= self.limit:
                    return
                for file in files:
                    file.unlink(missing_ok=True)
                total -= used


def cached_index(url: str, cache: CacheConfig, retries: int = 0, retry_wait_s: float = 0.5) -> CachedIndex:
    """The index of a data set at a URL (or in a slow folder), whose shards are read through the cache.

    The copies are in a folder named after the URL and the content of the index, so that they are not used for an index
    that has changed. Raises DataError if there is no index, if it cannot be read, or if its largest shard is larger
    than the cache.
    """
    url = url.rstrip("/")
    content = _read(f"{url}/index.json", retries, retry_wait_s)
    if content is None:
        raise DataError(
            f"{url}: there is no index.json; run python -m dico_t2i.data DIR on the folder that holds the shards,"
            " and upload index.json and the *.index files along with the shards"
        )
    folder = Path(cache.path).expanduser() / hashlib.sha256(url.encode() + b"\0" + content).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "index.json", content)
    listed = _read(f"{url}/{QUARANTINE}", retries, retry_wait_s)
    write_atomically(folder / QUARANTINE, listed or b"")
    index, limit = read_index(folder), int(cache.max_gb * GIGABYTE)
    if not (folder / ARRAYS).exists():
        save_table(index.table, folder, content)
    if index.bytes.max() > limit:
        raise DataError(
            f"data.cache.max_gb: {cache.max_gb} is less than the largest shard of {url}, {int(index.bytes.max())} bytes"
        )
    return CachedIndex(**vars(replace(index, root=folder)), url=url, limit=limit)


def _shards(folder: Path) -> list[tuple[float, int, list[Path]]]:
    """Last use, bytes and files of each cached shard, the least recently used first. Its index is one of the files."""
    found: dict[str, tuple[float, int, list[Path]]] = {}
    for data in (entry for entry in os.scandir(folder) if entry.is_dir()):
        for file in os.scandir(data.path):
            if not file.name.endswith((".tar", ".tar.index")):
                continue
            with suppress(FileNotFoundError):
                used, size, files = found.get(name := file.path.removesuffix(".index"), (0.0, 0, []))
                status = file.stat()
                found[name] = max(used, status.st_mtime), size + status.st_size, [*files, Path(file.path)]
    return sorted(found.values(), key=lambda shard: shard[0])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(url: str, retries: int, wait_s: float) -> bytes | None:
    """A file's content; None if there is no such file. Raises DataError."""
    try:
        return patiently(lambda: read(url), retries, wait_s)
    except FileNotFoundError:
        return None
    except UrlError as error:
        raise DataError(str(error)) from None
    except OSError as error:
        raise DataError(f"{url}: cannot be read: {error}") from None
