"""Read every sample of a data set: checksums, images, moments, text features, captions, keys.

python data_prep/verify.py data/coco
python data_prep/verify.py data/coco_latents --repair --source data/coco --autoencoder /models/sd-vae-ft-ema

Exits with 1 and a list if there are problems, and with 2 if the folder is not a data set. Problems of samples are also
written to quarantine.jsonl, so that training skips those samples. --repair first makes missing and outdated indexes of
shards again; it also encodes damaged latent shards again, if their images and the encoders are given.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from data_prep import latents
from data_prep.checking import quarantine
from data_prep.checking.hashes import HashFile, equal, key_hash
from data_prep.checking.quarantine import Entry
from data_prep.common import alone, in_parallel
from dico_t2i.command import progress_bar, run, script_parser
from dico_t2i.data.decode import IMAGE_EXTENSIONS, decode_image, decode_moments
from dico_t2i.data.errors import SampleError, ShardError
from dico_t2i.data.index import DatasetIndex, load_index, write_index
from dico_t2i.data.reader import ShardReader
from dico_t2i.data.sample import POOLED, TEXT, captions_of
from dico_t2i.data.shard import MOMENTS, ShardIndex, index_shard

LISTED = 1000  # problems that are printed; all of them go to the quarantine

Sample = dict[str, Any]
Shape = tuple[int, ...]


@dataclass
class Findings:
    """The problems of one shard.

    problems: of the tar, which can be used nevertheless; entries: samples that cannot be used. keys: uint64 (n,), a
    hash of each sample's key. texts: shapes of the text features of a caption.
    """

    shard: int
    problems: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    texts: set[tuple[Shape, ...]] = field(default_factory=set)


@dataclass
class Verdict:
    """The problems of a data set, by shard."""

    problems: dict[str, list[str]] = field(default_factory=dict)
    entries: dict[str, list[Entry]] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """One line for each problem."""
        lines = list(self.strays)
        for shard in sorted({*self.problems, *self.entries}):
            lines += self.problems.get(shard, [])
            lines += [
                f"{e.shard}: {e.reason if e.key is None else f'sample {e.key!r}: {e.reason}'}"
                for e in self.entries.get(shard, [])
            ]
        return lines


def verify(index: DatasetIndex, workers: int, shards: Sequence[int] | None = None) -> Verdict:
    """Read all shards, or the given ones, with ``workers`` processes."""
    chosen = range(len(index.names)) if shards is None else shards
    jobs = ((shard, alone(index, shard)) for shard in chosen)
    verdict, texts = Verdict(), {}
    keys = HashFile(index.samples, index.root)
    with progress_bar() as progress:
        results = in_parallel(verify_shard, jobs, workers)
        for found in progress.track(results, total=len(chosen), description="shards"):
            name = index.names[found.shard]
            if found.problems:
                verdict.problems[name] = found.problems
            if found.entries:
                verdict.entries[name] = found.entries
            if len(found.keys) == index.samples[found.shard]:
                keys.put(found.shard, found.keys)
            texts.update(dict.fromkeys(found.texts, name))
    if len(texts) > 1:
        found_in = ", ".join(f"{shapes} in {name}" for shapes, name in texts.items())
        verdict.strays.append(f"text features of several encoders: {found_in}")
    if shards is None:
        for shard, entry in _repeated_keys(index, keys):
            verdict.entries.setdefault(index.names[shard], []).append(entry)
        names = {path.name for path in index.root.iterdir()}
        unlisted = sorted(name for name in names - set(index.names) if name.endswith(".tar"))
        verdict.strays += [f"{name}: not in index.json" for name in unlisted]
        verdict.strays += [f"{name}: left by an interrupted run" for name in sorted(names) if name.endswith(".part")]
    return verdict


def verify_shard(shard: int, index: DatasetIndex) -> Findings:
    """Read the only shard of an index, as a tar and sample by sample."""
    found, name = Findings(shard), index.names[0]
    try:
        table, walked = index.shard(0), index_shard(index.path(0))
    except ShardError as error:
        found.entries.append(Entry(name, None, str(error)))
        return found
    found.problems += [f"{name}: damaged at {place}" for place in walked.damage]
    if not len(table) == len(walked) == index.samples[0]:
        counts = f"{len(walked)} samples, {len(table)} in its index, {index.samples[0]} in index.json"
        found.problems.append(f"{name}: {counts}")
    reader, shapes = ShardReader(index), _moment_shapes(index, table)
    for member in range(len(table)):
        reasons = _sample_problems(reader, member, shapes[member] if shapes else None, found)
        found.entries += [Entry(name, table.key(member), reason) for reason in reasons]
    reader.close()
    found.keys = np.array([key_hash(table.key(member)) for member in range(len(table))], np.uint64)
    return found


def _moment_shapes(index: DatasetIndex, table: ShardIndex) -> list[Shape] | None:
    """The shape that each sample's moments must have; None for images. Raises ValueError if the meta data lack it."""
    if index.kind == "images":
        return None
    try:
        channels, size, mirrored = (index.meta[name] for name in ("latent_channels", "latent_size", "mirrored"))
        start = (*((2,) if mirrored else ()), 2 * channels)
        buckets = table.bucket
        if buckets is None:
            return [(*start, size, size)] * len(table)
        sides = [[side * size // index.meta["image_size"] for side in shape] for shape in index.meta["buckets"]]
        return [(*start, *sides[bucket]) for bucket in buckets.tolist()]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{index.root / 'index.json'}: it does not describe its latents ({error!r})") from None


def _sample_problems(reader: ShardReader, member: int, shape: Shape | None, found: Findings) -> list[str]:
    try:
        sample = reader.read(0, member)
    except SampleError as error:
        return [error.reason]
    reasons = []
    for check in (
        partial(_check_pixels, shape=shape),
        _check_condition,
        partial(_check_text, described="text_encoder" in reader.index.meta, found=found),
    ):
        try:
            check(sample)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            reasons.append(str(error))
    return reasons


def _check_pixels(sample: Sample, shape: Shape | None) -> None:
    """Check an image, or moments of this shape. Raises ValueError."""
    names = IMAGE_EXTENSIONS if shape is None else (MOMENTS,)
    data = next((sample[name] for name in names if name in sample), None)
    if data is None:
        raise ValueError("it has no image" if shape is None else f"it has no {MOMENTS}")
    if shape is None:
        decode_image(data, 64, "resize")
    else:
        decode_moments(data, shape)


def _check_condition(sample: Sample) -> None:
    """Check that there is a caption or a label, and that each of them can be read. Raises ValueError."""
    if "cls" in sample:
        int(sample["cls"])
        return
    try:
        captions_of(sample)
    except SampleError as error:
        raise ValueError(f"it has neither a caption nor a label: {error.reason}") from None


def _check_text(sample: Sample, described: bool, found: Findings) -> None:
    """Check text features, if the data set has them: float16, finite, of all captions. Raises ValueError."""
    if not described and TEXT not in sample:
        return
    shapes = []
    for name in (TEXT, POOLED):
        values, captions = _array(sample, name), len(captions_of(sample))
        if values.dtype != np.float16 or values.ndim < 2 or len(values) != captions:
            raise ValueError(f"{name} is {values.dtype} {values.shape}, expected float16 of {captions} captions")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} is not finite")
        shapes.append(values.shape[1:])
    found.texts.add(tuple(shapes))


def _array(sample: Sample, name: str) -> np.ndarray:
    if name not in sample:
        raise ValueError(f"it has no {name}")
    try:
        return np.lib.format.read_array(io.BytesIO(sample[name]), allow_pickle=False)
    except Exception as error:  # numpy's header parser can raise almost any error on bad bytes
        raise ValueError(f"{name} cannot be decoded: {type(error).__name__}: {error}") from None


def _repeated_keys(index: DatasetIndex, keys: HashFile) -> Iterator[tuple[int, Entry]]:
    """Yield samples whose key an earlier sample has."""
    table = lru_cache(64)(index.shard)
    for pairs in equal(keys.values):
        for first, later in zip(*(places.tolist() for places in pairs), strict=True):
            (earlier, i), (shard, j) = keys.place(first), keys.place(later)
            key = table(shard).key(j)
            if table(earlier).key(i) == key:  # the keys themselves and not only their hashes
                yield shard, Entry(index.names[shard], key, f"a sample in {index.names[earlier]} has the same key")


def reindex(folder: Path) -> DatasetIndex:
    """Index again the shards whose own index is missing or does not fit, and then the data set."""
    for file in (folder / "index.json", folder / "settings.json"):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if "shards" in content:
            return write_index(folder, content.get("kind"), content.get("meta"))
        return write_index(folder, None, content)
    return write_index(folder)


def encode_again(index: DatasetIndex, damaged: Sequence[str], args: argparse.Namespace) -> list[str]:
    """Make the damaged and the missing latent shards again; returns their names. Raises ValueError.

    The encoders must be those that made the other shards, and the images the same.
    """
    made = {name: index.meta[name] for name in ("crop", "dtype")}
    settings = {"data": args.source, "out": index.root, "size": index.meta["image_size"], **made}
    job = latents.prepare(argparse.Namespace(**{**vars(args), **settings, "mirror": index.meta["mirrored"]}))
    wanted = {*damaged, *(name for name in job.source.names if name not in index.names)}
    shards = [shard for shard, name in enumerate(job.source.names) if name in wanted]
    latents.encode_shards(job, shards)
    latents.write_latent_index(index.root, job.source.names, job.meta)
    return [job.source.names[shard] for shard in shards]


def repair(index: DatasetIndex, verdict: Verdict, args: argparse.Namespace) -> DatasetIndex:
    """Encode damaged latents again, if the images are given, and verify them again."""
    if args.source is None:
        return index
    redone = encode_again(index, [*verdict.problems, *verdict.entries], args)
    index = load_index(index.root)
    again = verify(index, args.workers, [index.names.index(name) for name in redone])
    for name in redone:
        verdict.problems.pop(name, None)
        verdict.entries.pop(name, None)
    verdict.problems.update(again.problems)
    verdict.entries.update(again.entries)
    print(f"{index.root}: {len(redone)} shards encoded again")
    return index


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="folder of shards")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one for each CPU core)")
    add("--repair", action="store_true", help="repair indexes and, given their source, latents")
    add("--source", type=Path, metavar="DIR", help="of latents: the image shards that they were made from")
    latents.add_encoder_options(parser, required=False)
    args = parser.parse_args(argv)
    if (args.source is None) != (args.autoencoder is None) or (args.source and not args.repair):
        raise ValueError("--source and --autoencoder go together, with --repair")
    if args.workers < 1:
        raise ValueError("--workers: at least 1")
    try:
        index = reindex(args.folder) if args.repair else load_index(args.folder)
    except ShardError as error:  # a shard is missing, cut off or has grown
        print(f"{error}\n  --repair does this together with all other repairs")
        return 1
    verdict = verify(index, args.workers)
    if args.repair:
        index = repair(index, verdict, args)
    entries = (entry for name in sorted(verdict.entries) for entry in verdict.entries[name])
    quarantine.replace(index.root, entries, duplicates=False)
    return report(index, verdict.lines())


def report(index: DatasetIndex, lines: Sequence[str]) -> int:
    """Print the problems and return the exit status."""
    print(f"{index.root}: {len(index)} samples in {len(index.names)} shards ({index.kind})")
    for line in lines[:LISTED]:
        print(f"  {line}")
    if len(lines) > LISTED:
        print(f"  and {len(lines) - LISTED} more")
    print(f"{len(lines)} problems" if lines else "all is well")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(run(main))
