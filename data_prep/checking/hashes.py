"""64-bit hashes of all samples of a data set, kept on disk, and the search for equal and similar ones.

For n samples 8 n bytes are on disk. Memory holds a few million hashes at a time, for any n.
"""

import itertools
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

PART = 1 << 22  # hashes that are sorted together
BITS = 64
_CHUNK = 1 << 22

Pairs = tuple[np.ndarray, np.ndarray]  # positions of the earlier and of the later samples, int64


class HashFile:
    """uint64 hashes by the samples' positions in the data set, in a temporary file that ends with the process.

    The file is in ``folder``, or in the system's temporary folder if ``folder`` cannot be written.
    """

    def __init__(self, samples: Sequence[int] | np.ndarray, folder: Path) -> None:
        ends = np.cumsum(np.asarray(samples, np.int64))
        self.starts = np.concatenate(([0], ends))
        self._file = tempfile.TemporaryFile(dir=folder if os.access(folder, os.W_OK) else None)  # noqa: SIM115 lives as long as this
        self._file.truncate(max(8, 8 * int(self.starts[-1])))
        self.values = np.memmap(self._file, np.uint64, "r+", shape=(int(self.starts[-1]),))
        for start in range(0, len(self.values), _CHUNK):  # different from all others until they are known
            stop = min(start + _CHUNK, len(self.values))
            self.values[start:stop] = np.arange(start + 1, stop + 1, dtype=np.uint64)

    def put(self, shard: int, hashes: np.ndarray) -> None:
        start = int(self.starts[shard])
        self.values[start : start + len(hashes)] = hashes

    def place(self, number: int) -> tuple[int, int]:
        """The shard of a sample, and the sample's position in it."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return shard, number - int(self.starts[shard])


def key_hash(key: str) -> int:
    """A hash of a sample's key, 64 bits."""
    return int.from_bytes(blake2b(key.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def equal(hashes: np.ndarray) -> Iterator[Pairs]:
    """Find every sample that has the hash of an earlier one, and pair it with the first sample that has this hash."""
    for places, keys in _parts(hashes, (1 << BITS) - 1):
        order = np.argsort(keys, kind="stable")
        places, keys = places[order], keys[order]
        starts = np.flatnonzero(np.diff(keys, prepend=keys[:1] + np.uint64(1)))
        first = np.repeat(places[starts], np.diff(np.append(starts, len(keys))))
        later = places != first
        if later.any():
            yield first[later], places[later]


def near(hashes: np.ndarray, distance: int) -> Iterator[Pairs]:
    """Find all pairs of samples whose hashes differ in 1 to ``distance`` bits; some pairs occur more than once.

    The bits are divided into distance + c blocks. Two such hashes agree in at least c of these blocks, so sorting by
    those blocks makes them neighbours. c is the smallest number that leaves few neighbours by chance. A hash of 0 means
    that there is none. Reduce equal hashes to one first, by setting the others to 0; otherwise the work grows with the
    square of their number.
    """
    agreeing = _agreeing_blocks(distance, max(2, len(hashes)))
    blocks = np.array_split(np.arange(BITS), distance + agreeing)
    for chosen in itertools.combinations(blocks, agreeing):
        bits = np.concatenate(chosen)
        for places, keys in _parts(hashes, sum(1 << bit for bit in bits.tolist())):
            yield from _neighbours(hashes, places, keys, distance)


def _agreeing_blocks(distance: int, samples: int) -> int:
    """The smallest number of blocks whose bits can distinguish ``samples`` hashes."""
    wanted = math.log2(samples)
    return next((c for c in range(1, 9) if c * (BITS // (distance + c)) >= wanted), 8)


def _neighbours(hashes: np.ndarray, places: np.ndarray, keys: np.ndarray, distance: int) -> Iterator[Pairs]:
    order = np.argsort(keys, kind="stable")
    places, keys = places[order], keys[order]
    values = hashes[places]
    left = np.arange(len(keys))  # positions that may have a neighbour at this distance
    for step in itertools.count(1):
        left = left[left + step < len(keys)]
        left = left[keys[left] == keys[left + step]]
        if not left.size:
            return
        close = np.bitwise_count(values[left] ^ values[left + step]) <= distance
        if close.any():
            pairs = places[left[close]], places[left[close] + step]
            yield np.minimum(*pairs), np.maximum(*pairs)


def _parts(hashes: np.ndarray, mask: int) -> Iterator[Pairs]:
    """Yield the positions and keys (masked hashes, mixed) of all hashes except 0, in parts of similar size.

    Equal keys are in the same part.
    """
    parts = max(1, -(-len(hashes) // PART))
    for part in range(parts):
        places, keys = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        for start in range(0, len(hashes), _CHUNK):
            chunk = np.asarray(hashes[start : start + _CHUNK])
            mixed = _mixed(chunk & np.uint64(mask))
            mine = np.flatnonzero((chunk != 0) & (mixed % np.uint64(parts) == part))
            places.append(mine + start)
            keys.append(mixed[mine])
        yield np.concatenate(places), np.concatenate(keys)


def _mixed(keys: np.ndarray) -> np.ndarray:
    """Mix the bits one to one, so that any part of them distinguishes keys (by shifts and an odd factor)."""
    keys = (keys ^ (keys >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    return keys ^ (keys >> np.uint64(33))
