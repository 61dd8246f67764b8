"""Find images that occur more than once in a data set, and list all but the first, so that training skips them.

python data_prep/duplicates.py data/laion --distance 3

Exact duplicates have the same bytes. Near duplicates have difference hashes that differ in at most --distance bits. A
difference hash has 64 bits, which say for each cell of an 8 x 9 grid of grey levels whether it is brighter than its
right neighbour; images without contrast have no such hash. The list is quarantine.jsonl, which latents.py also uses.
Counts are written to duplicates.json, and pictures of pairs to duplicates.png. Run it on image shards, before encoding.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from data_prep.checking import quarantine
from data_prep.checking.hashes import HashFile, equal, near
from data_prep.checking.quarantine import DUPLICATE, Entry
from data_prep.common import alone, in_parallel
from dico_t2i.command import progress_bar, run, script_parser
from dico_t2i.data.decode import IMAGE_EXTENSIONS, decode_image
from dico_t2i.data.errors import DataError, SampleError
from dico_t2i.data.index import DatasetIndex, load_index
from dico_t2i.data.reader import ShardReader
from dico_t2i.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 16  # pairs in duplicates.png
_CONTRAST = 8.0  # least difference in grey level of the brightest and the darkest cell, for an image to be compared
_CELL = 8  # pixels
_CHUNK = 1 << 22


class Hashes(NamedTuple):
    """The hashes of a shard's samples, of their bytes and of their pictures, uint64 (n,) each; 0 if there is none."""

    shard: int
    exact: np.ndarray
    visual: np.ndarray


def difference_hash(image: bytes) -> int:
    """64 bits, not all 0, that survive scaling and compression; 0 for an image without contrast. Raises SampleError."""
    side = 9 * _CELL
    pixels = decode_image(image, side, "resize").float().mean(dim=0).numpy()
    grid = pixels.reshape(8, 9, 9, _CELL).mean(axis=(1, 3))
    if np.ptp(grid) < _CONTRAST:
        return 0
    bits = np.packbits(grid[:, 1:] > grid[:, :-1])
    return int.from_bytes(bits.tobytes(), "big") or 1


def hash_shard(shard: int, index: DatasetIndex) -> Hashes:
    """Hash the samples of the only shard of an index; samples that cannot be read have no hashes."""
    exact, visual = np.zeros((2, int(index.samples[0])), np.uint64)
    reader = ShardReader(index)
    for member in range(len(exact)):
        try:
            sample = reader.read(0, member)
            image = next((sample[name] for name in IMAGE_EXTENSIONS if name in sample), b"")
            visual[member] = difference_hash(image)
            exact[member] = int.from_bytes(blake2b(image, digest_size=8).digest(), "big")
        except SampleError:
            continue  # verify.py reports it
    reader.close()
    return Hashes(shard, exact, visual)


class Duplicates:
    """Finds samples that repeat an earlier one. of: the position of that one, or else their own; int64, on disk."""

    def __init__(self, index: DatasetIndex, workers: int) -> None:
        self.index = index
        self.exact, self.visual, own = (HashFile(index.samples, index.root) for _ in range(3))
        self.of = own.values.view(np.int64)
        self.of -= 1  # samples without a hash have their position, counted from 1, in its place
        jobs = ((shard, alone(index, shard)) for shard in range(len(index.names)))
        with progress_bar() as progress:
            results = in_parallel(hash_shard, jobs, workers)
            for hashes in progress.track(results, total=len(index.names), description="shards"):
                self.exact.put(hashes.shard, hashes.exact)
                self.visual.put(hashes.shard, hashes.visual)

    def find(self, distance: int | None) -> None:
        """Find exact duplicates and, if a distance is given, near ones."""
        for first, later in equal(self.exact.values):
            self.of[later] = first
        if distance is None:
            return
        for first, later in equal(self.visual.values):
            np.minimum.at(self.of, later, first)
            self.visual.values[later] = 0
        for first, later in near(self.visual.values, distance) if distance else ():
            np.minimum.at(self.of, later, first)

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Yield the positions of a sample and of the earlier one that it repeats, in order."""
        for start in range(0, len(self.of), _CHUNK):
            places = np.arange(start, min(start + _CHUNK, len(self.of)))
            repeated = places[self.of[places] != places]
            yield from zip(repeated.tolist(), self.of[repeated].tolist(), strict=True)

    def entries(self, counts: Counter[str]) -> Iterator[Entry]:
        """Yield the entries for the quarantine, and count them by kind."""
        table = lru_cache(64)(self.index.shard)
        for later, first in self.pairs():
            (shard, member), (earlier, i) = self.exact.place(later), self.exact.place(first)
            kind = "exact" if self.exact.values[later] == self.exact.values[first] else "near"
            counts[kind] += 1
            reason = f"{DUPLICATE}{table(earlier).key(i)!r} in {self.index.names[earlier]} ({kind})"
            yield Entry(self.index.names[shard], table(shard).key(member), reason)

    def draw(self, path: Path) -> None:
        """Draw a PNG of the first pairs that are not exact duplicates: the kept sample above, the other one below."""
        near_ones = ((b, a) for a, b in self.pairs() if self.exact.values[a] != self.exact.values[b])
        chosen = list(islice(near_ones, SHOWN))
        if not chosen:
            path.unlink(missing_ok=True)
            return
        reader = ShardReader(self.index)
        rows = [[self._thumbnail(reader, place) for place in row] for row in zip(*chosen, strict=True)]
        reader.close()
        import torch

        grid = torch.cat([torch.cat(row, dim=2) for row in rows], dim=1)
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)

    def _thumbnail(self, reader: ShardReader, place: int) -> "Tensor":
        sample = reader.read(*self.exact.place(place))
        return decode_image(next(sample[name] for name in IMAGE_EXTENSIONS if name in sample), 128, "resize")


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="folder of image shards")
    add("--distance", type=int, default=3, help="most bits, 0 to 8, in which near duplicates differ (default: 3)")
    add("--exact-only", action="store_true", help="only look for equal bytes")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one for each CPU core)")
    args = parser.parse_args(argv)
    if not 0 <= args.distance <= 8 or args.workers < 1:
        raise ValueError("--distance: 0 to 8; --workers: at least 1")
    index = load_index(args.folder)
    if index.kind != "images":
        raise DataError(f"{args.folder}: it contains {index.kind}, expected images")
    duplicates, counts = Duplicates(index, args.workers), Counter[str](exact=0, near=0)
    duplicates.find(None if args.exact_only else args.distance)
    quarantine.replace(index.root, duplicates.entries(counts), duplicates=True)
    duplicates.draw(index.root / "duplicates.png")
    found = {"samples": len(index), "distance": None if args.exact_only else args.distance, **counts}
    write_atomically(index.root / "duplicates.json", (json.dumps(found) + "\n").encode())
    print(f"{index.root}: {counts['exact']} exact and {counts['near']} near duplicates among {len(index)} samples")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
