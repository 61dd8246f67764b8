"""Reads ranges of the tensors in one file of a checkpoint, and compares what it reads with the checksums.

The file is on disk, at a URL, or both. It is not mapped into memory, and a range is read in windows of bounded size, so
that neither large files nor large tensors need much memory.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from dico_t2i.remote import patiently, read_range

CHUNK = 1 << 18  # bytes of a tensor that share a checksum
WINDOW = 64 * CHUNK  # the most bytes that a read holds in memory

_RETRIES, _RETRY_WAIT_S = 3, 1.0  # of reads at URLs

Result = TypeVar("Result")


class CheckpointError(ValueError):
    """Raised for a checkpoint that cannot be used; the message names the file and the reason."""


class DamagedError(CheckpointError):
    """Raised for a checkpoint with a file that is missing, incomplete or changed."""


@dataclass(frozen=True)
class FileEntry:
    """What a manifest says of a file.

    pieces: the name, start and number of elements of each piece. crc32: for each kind the checksums of its tensors, in
    the order of the pieces; None in checkpoints that were written before there were any.
    """

    size: int
    sha256: str
    pieces: Sequence[tuple[str, int, int]]
    crc32: Mapping[str, Sequence[str | None]] | None = None

    def sums(self) -> dict[str, str]:
        """The checksums of each tensor, by its key in the file."""
        return {
            f"{kind}:{name}:{start}": digits
            for kind, column in (self.crc32 or {}).items()
            for (name, start, _), digits in zip(self.pieces, column, strict=True)
            if digits is not None
        }


def checksums(content: memoryview) -> str:
    """The CRC-32 of each chunk of a tensor's bytes, eight hexadecimal digits each."""
    return "".join(f"{zlib.crc32(content[at : at + CHUNK]):08x}" for at in range(0, len(content), CHUNK))


class ShardFile:
    """A file of a checkpoint, open for reading.

    If the file on disk is missing or damaged, the one at the URL is read. Opening and reading raise DamagedError if
    that does not help, and CheckpointError if the URL cannot be reached.
    """

    def __init__(self, path: Path, url: str | None, entry: FileEntry, buffer: memoryview) -> None:
        """buffer: of WINDOW bytes, for what is read."""
        self.entry, self.bytes_read = entry, 0
        self._sums, self._buffer = entry.sums(), buffer
        self._left: list[Callable[[], _Place]] = [lambda: _Disk(path, entry.size)]
        if url is not None:
            self._left.append(lambda: _Remote(url))
        self._problems: list[str] = []
        self._place: _Place | None = None
        self._anywhere(lambda: None)

    def read(self, key: str, start: int, target: Tensor) -> None:
        """Fill target (numel,) with the elements of a tensor from ``start`` on."""
        begin, end = 4 * start, 4 * (start + target.numel())
        for low in range(begin // CHUNK * CHUNK, end, WINDOW):
            high = min(low + WINDOW, -(-end // CHUNK) * CHUNK)
            window = self._anywhere(lambda low=low, high=high: self._window(key, low, high))  # type: ignore[misc]
            first, last = max(begin, low), min(end, low + len(window))
            part = torch.frombuffer(window[first - low : last - low], dtype=torch.float32)
            target[(first - begin) // 4 : (last - begin) // 4].copy_(part)

    def verify(self) -> None:
        """Compare the hash of the whole file."""
        if self.entry.crc32 is not None:  # otherwise it was compared when the file was opened
            self._anywhere(self._compare_hash)

    def close(self) -> None:
        if self._place is not None:
            self._place.close()

    def _anywhere(self, work: Callable[[], Result]) -> Result:
        """The result of work on the first place where the file is intact."""
        while True:
            try:
                if self._place is None:
                    self._open()
                return work()
            except DamagedError as error:
                self.close()
                self._place = None
                self._problems.append(str(error))
                if not self._left:
                    raise DamagedError("; ".join(self._problems)) from None

    def _open(self) -> None:
        self._place = self._left.pop(0)()
        try:
            length = int.from_bytes(self._place.read(0, 8), "little")
            if 8 + length > self.entry.size:
                raise ValueError
            header = json.loads(self._place.read(8, 8 + length))
            header.pop("__metadata__", None)
            offsets = {key: about["data_offsets"] for key, about in header.items()}
            self._ranges = {key: (8 + length + begin, 8 + length + end) for key, (begin, end) in offsets.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise DamagedError(f"{self._place.name}: its header does not match its hash") from None
        self.bytes_read += 8 + length
        if self.entry.crc32 is None:
            self._compare_hash()

    def _window(self, key: str, low: int, high: int) -> memoryview:
        """The bytes of a tensor from ``low`` to ``high``, or to its end; valid until the next call."""
        assert self._place is not None
        if key not in self._ranges:
            raise DamagedError(f"{self._place.name}: has no {key}")
        begin, end = self._ranges[key]
        window = self._fetch(begin + low, min(begin + high, end))
        expected = self._sums.get(key)
        if expected is not None and checksums(window) != expected[8 * low // CHUNK :][: 8 * -(-len(window) // CHUNK)]:
            raise DamagedError(f"{self._place.name}: content does not match its hash")
        return window

    def _compare_hash(self) -> None:
        assert self._place is not None
        digest = hashlib.sha256()
        for low in range(0, self.entry.size, WINDOW):
            digest.update(self._fetch(low, min(low + WINDOW, self.entry.size)))
        if digest.hexdigest() != self.entry.sha256:
            raise DamagedError(f"{self._place.name}: content does not match its hash")

    def _fetch(self, low: int, high: int) -> memoryview:
        assert self._place is not None
        window = self._buffer[: max(0, high - low)]
        self._place.fill(window, low)
        self.bytes_read += len(window)
        return window


class _Place(Protocol):
    """Where a file is read. All methods raise CheckpointError."""

    name: str

    def fill(self, window: memoryview, at: int) -> None:
        """Fill the window with the bytes from ``at`` on."""

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to ``stop``."""

    def close(self) -> None: ...


class _Disk:
    """A file on disk, which must have a given size."""

    def __init__(self, path: Path, size: int) -> None:
        self.name = str(path)
        try:
            self._file = path.open("rb", buffering=0)
        except FileNotFoundError:
            raise DamagedError(f"{path}: missing") from None
        found = os.fstat(self._file.fileno()).st_size
        if found != size:
            self._file.close()
            raise DamagedError(f"{path}: {found} bytes, should be {size}")

    def fill(self, window: memoryview, at: int) -> None:
        done = 0
        while done < len(window):
            try:
                count = os.preadv(self._file.fileno(), [window[done:]], at + done)
            except OSError as error:
                raise DamagedError(f"{self.name}: cannot be read: {error}") from None
            if not count:
                raise DamagedError(f"{self.name}: it ends too early")
            done += count

    def read(self, start: int, stop: int) -> bytes:
        content = bytearray(stop - start)
        self.fill(memoryview(content), start)
        return bytes(content)

    def close(self) -> None:
        self._file.close()


class _Remote:
    """A file at a URL."""

    def __init__(self, url: str) -> None:
        self.name = url

    def fill(self, window: memoryview, at: int) -> None:
        window[:] = self.read(at, at + len(window))

    def read(self, start: int, stop: int) -> bytes:
        try:
            content = patiently(lambda: read_range(self.name, start, stop), _RETRIES, _RETRY_WAIT_S)
        except FileNotFoundError:
            raise DamagedError(f"{self.name}: missing") from None
        except OSError as error:
            raise CheckpointError(f"{self.name}: cannot be read: {error}") from None
        if len(content) != stop - start:
            raise DamagedError(f"{self.name}: it ends too early")
        return content

    def close(self) -> None:
        pass
