"""Reads the members of samples from shards by position, and compares them with their checksums."""

from __future__ import annotations

import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Collection
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dico_t2i.data.errors import QuarantinedError, SampleError, ShardError
from dico_t2i.data.index import DatasetIndex
from dico_t2i.data.shard import ShardIndex

LOOK_AGAIN_S = 60.0  # until a lost shard is tried again


_MAX_GAP = 4096  # bytes between members that are read as well, to save a read; a tar header has 512


class _ByteRange(NamedTuple):
    """The place of a member in the tar, and its checksum."""

    extension: str
    offset: int
    size: int
    crc32: int


class _Open:
    """An open shard, and the places of the wanted members in it."""

    def __init__(self, file: BinaryIO, table: ShardIndex, wanted: Collection[str] | None) -> None:
        self.file, self.table = file, table
        columns = [c for c, name in enumerate(table.extensions) if wanted is None or name in wanted]
        self._names = [table.extensions[column] for column in columns]
        self._table_rows = np.stack((table.offsets, table.sizes, table.crc32), axis=-1)[:, columns]
        self._rows: dict[int, np.ndarray] = {}  # of each bucket that was read from

    def ranges(self, row: int) -> list[_ByteRange]:
        """The places of the wanted members of a sample."""
        found = zip(self._names, self._table_rows[row].tolist(), strict=True)
        return [_ByteRange(name, *part) for name, part in found if part[0] >= 0]

    def row(self, member: int, bucket: int | None) -> int:
        """The row of the table for a member of the shard, or of a bucket in the shard. Raises IndexError."""
        rows: range | np.ndarray = range(len(self.table))
        if bucket is not None:
            if bucket not in self._rows:
                known = self.table.bucket
                self._rows[bucket] = np.flatnonzero(known == bucket) if known is not None else np.empty(0, np.int64)
            rows = self._rows[bucket]
        if member >= len(rows):
            of = "" if bucket is None else f" of bucket {bucket}"
            raise IndexError(f"sample {member} is out of bounds for {len(rows)} samples{of}")
        return int(rows[member])


class ShardReader:
    """Reads samples by (shard, member), and keeps the ``open_shards`` most recently used shards open.

    If the file system fails, the shard is opened again and the read is repeated up to ``retries`` times, after
    retry_wait_s, twice that, four times that, ... seconds. A shard that still cannot be read is *lost*: its samples
    fail at once, and it is tried again once a minute. Reads are positional, so that forked processes can share one
    reader. extensions: the extensions of the members to read; None reads all. obey_quarantine: whether samples on the
    data set's quarantine list raise ``QuarantinedError``.
    """

    def __init__(
        self,
        index: DatasetIndex,
        open_shards: int = 64,
        retries: int = 0,
        retry_wait_s: float = 0.5,
        *,
        extensions: Collection[str] | None = None,
        obey_quarantine: bool = False,
    ) -> None:
        self.index, self.open_shards, self.retries, self.retry_wait_s = index, open_shards, retries, retry_wait_s
        self.extensions = extensions
        self._quarantine = index.quarantine if obey_quarantine else {}
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._lost: dict[int, tuple[float, str]] = {}  # when to try again, and the error

    def read(self, shard: int, member: int, patient: bool = True, bucket: int | None = None) -> dict[str, Any]:
        """Read the members of a sample: a dictionary by extension, with the key as ``__key__``.

        patient: whether to retry. bucket: if given, ``member`` counts only the samples of this bucket. Raises
        SampleError if the shard cannot be read, or if a checksum is wrong.
        """
        if self._quarantine.get(shard, ()) is None:
            raise QuarantinedError(self.index.names[shard], "", "the shard is in quarantine")
        if self.is_lost(shard):
            raise SampleError(self.index.names[shard], "", f"cannot be read: {self._lost[shard][1]}")
        retries = self.retries if patient and shard not in self._lost else 0
        for attempt in range(retries + 1):
            try:
                sample = self._read(shard, member, bucket)
            except (OSError, ShardError) as error:
                self._forget(shard)
                reason = str(error)
            else:
                self._lost.pop(shard, None)
                return sample
            if attempt < retries:
                time.sleep(self.retry_wait_s * 2**attempt)
        if patient:
            self._lost[shard] = time.monotonic() + LOOK_AGAIN_S, reason
        raise SampleError(self.index.names[shard], "", f"cannot be read: {reason}")

    def is_lost(self, shard: int) -> bool:
        """Whether every sample of the shard fails at present."""
        return shard in self._lost and time.monotonic() < self._lost[shard][0]

    def _read(self, shard: int, member: int, bucket: int | None) -> dict[str, Any]:
        name, opened = self.index.names[shard], self._shard(shard)
        try:
            row = opened.row(member, bucket)
        except IndexError as error:
            raise SampleError(name, "", f"cannot be read: {error}") from None
        key = opened.table.key(row)
        if self._quarantine and key in (self._quarantine.get(shard) or ()):
            raise QuarantinedError(name, key, "is in quarantine")
        sample: dict[str, Any] = {"__key__": key}
        ranges = opened.ranges(row)
        for part, data in zip(ranges, _read_ranges(opened.file, ranges), strict=True):
            if len(data) != part.size or zlib.crc32(data) != part.crc32:
                self._forget(shard)  # so that the next read opens the file again, which may have been replaced
                raise SampleError(name, key, f"checksum of {part.extension} at byte {part.offset} is wrong")
            sample[part.extension] = data
        return sample

    def close(self) -> None:
        for shard in list(self._open):
            self._forget(shard)

    def _shard(self, shard: int) -> _Open:
        if shard not in self._open:
            while len(self._open) >= self.open_shards:
                self._forget(next(iter(self._open)))
            table = self.index.shard(shard)
            if table.tar_bytes > self.index.bytes[shard]:
                raise ShardError(f"{self.index.names[shard]}: its index is that of a larger shard")
            self._open[shard] = _Open(self.index.open(shard), table, self.extensions)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _forget(self, shard: int) -> None:
        if shard in self._open:
            self._open.pop(shard).file.close()


def _read_ranges(file: BinaryIO, ranges: list[_ByteRange]) -> list[bytes]:
    """The bytes of each range, in one read if the ranges are close together."""
    if not ranges:
        return []
    low = min(part.offset for part in ranges)
    high = max(part.offset + part.size for part in ranges)
    if high - low > sum(part.size for part in ranges) + _MAX_GAP * len(ranges):
        return [os.pread(file.fileno(), part.size, part.offset) for part in ranges]
    data = os.pread(file.fileno(), high - low, low)
    return [data[part.offset - low : part.offset - low + part.size] for part in ranges]
