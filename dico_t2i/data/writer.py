"""Writes shards with their indexes."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import numpy as np

from dico_t2i.data.errors import DataError, ShardError
from dico_t2i.data.index import DatasetIndex, write_index
from dico_t2i.data.shard import Kind, ShardIndex, index_path, index_shard
from dico_t2i.data.tar import split_name
from dico_t2i.files import flush, temporary


class ShardFile:
    """A shard that is being written: a temporary file until ``commit``, which makes the complete tar and its index.

    Its bytes depend only on the samples (there are no times, users or groups).
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

        ``__bucket__``, if all samples have it, goes to the index. Raises DataError for a key or extension that would
        not be read back unchanged.
        """
        members = {name: _encode(value) for name, value in sample.items() if not name.startswith("__")}
        key = str(sample.get("__key__", ""))
        for extension in members:
            if split_name(f"{key}.{extension}") != (key, extension):
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
        """Finish the tar, index it, and rename both to their final names."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = index_shard(self._part)
        if index.damage or len(index) != self.samples:
            raise ShardError(f"{self.path}: cannot be read back as written; {'; '.join(index.damage)}")
        if self._buckets:
            if len(self._buckets) != self.samples:
                raise DataError(f"{self.path}: {len(self._buckets)} of {self.samples} samples have a __bucket__")
            index = replace(index, bucket=np.array(self._buckets, np.int16))
        index.save(index_path(self.path))
        self._part.replace(self.path)
        flush(self.path.parent)
        return index

    def discard(self) -> None:
        """Delete the unfinished shard."""
        with suppress(OSError):  # for example, if the disk is full
            self._tar.close()
        self._file.close()
        self._part.unlink(missing_ok=True)


class ShardWriter:
    """Writes samples into numbered shards of a new folder, and ``index.json`` at the end.

    As a context manager, after an exception it deletes the unfinished shard and writes no ``index.json``. Raises
    DataError if the folder already holds shards.
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
            raise DataError(f"{self.root}: holds shards already; choose a different folder or remove this one")
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
