"""Read every sample of a data set: checksums, images, moments, captions.

python data_prep/verify.py data/coco

Exits with 1 and a list if anything is wrong, with 2 if the folder is no data set.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_prep.common import progress_bar, run
from dico_t2i.data.index import MOMENTS, DatasetIndex, ShardError, index_shard, load_index
from dico_t2i.data.loader import IMAGE_EXTENSIONS
from dico_t2i.data.reader import SampleError, ShardReader, decode_image, decode_moments

Sample = dict[str, bytes | str]


def verify(index: DatasetIndex, progress: Progress) -> list[str]:
    """One line for everything that is wrong with a data set."""
    problems = [f"{path.name}: not in index.json" for path in index.root.glob("*.tar") if path.name not in index.names]
    problems += [f"{path.name}: left by an interrupted run" for path in index.root.glob("*.part")]
    reader = ShardReader(index)
    task = progress.add_task("samples", total=len(index))
    for shard in range(len(index.names)):
        problems += _shard_problems(index, shard)
        for member in range(int(index.samples[shard])):
            problems += _sample_problems(reader, shard, member)
            progress.advance(task)
    reader.close()
    return problems


def _shard_problems(index: DatasetIndex, shard: int) -> list[str]:
    """What the tar itself says against its index."""
    name = index.names[shard]
    try:
        indexed, found = index.shard(shard), index_shard(index.path(shard))
    except ShardError as error:
        return [str(error)]
    problems = [f"{name}: damaged at {place}" for place in found.damage]
    if not len(indexed) == len(found) == index.samples[shard]:
        problems.append(
            f"{name}: {len(found)} samples, {len(indexed)} in its index, {index.samples[shard]} in index.json"
        )
    return problems


def _sample_problems(reader: ShardReader, shard: int, member: int) -> list[str]:
    try:
        sample = reader.read(shard, member)
    except SampleError as error:
        return [str(error)]
    check = _check_moments if reader.index.kind == "latents" else _check_image
    problems = []
    for part in (check, _check_condition):
        try:
            part(sample, reader.index)
        except (ValueError, TypeError, AttributeError) as error:
            problems.append(f"{reader.index.names[shard]}: sample {sample['__key__']!r}: {error}")
    return problems


def _check_image(sample: Sample, index: DatasetIndex) -> None:
    data = next((sample[name] for name in IMAGE_EXTENSIONS if name in sample), None)
    if not isinstance(data, bytes):
        raise ValueError("has no image")
    decode_image(data, 64, "resize")


def _check_moments(sample: Sample, index: DatasetIndex) -> None:
    data = sample.get(MOMENTS)
    if not isinstance(data, bytes):
        raise ValueError(f"has no {MOMENTS}")
    channels, size = index.meta["latent_channels"], index.meta["latent_size"]
    decode_moments(data, (*((2,) if index.meta["mirrored"] else ()), 2 * channels, size, size))


def _check_condition(sample: Sample, index: DatasetIndex) -> None:
    """A caption or a label: whichever there is must be readable, and one must be there."""
    about = json.loads(sample.get("json", "{}"))
    captions = about.get("captions", [sample.get("txt", b"")])
    if "cls" in sample:
        int(sample["cls"])
    elif not any(caption.strip() for caption in captions):
        raise ValueError("has neither a caption nor a label")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of shards")
    folder = parser.parse_args(argv).folder
    try:
        index = load_index(folder)
    except ShardError as error:  # a shard is missing, cut or has grown
        print(error)
        return 1
    with progress_bar() as progress:
        problems = verify(index, progress)
    print(f"{index.root}: {len(index)} samples in {len(index.names)} shards ({index.kind})")
    for problem in problems:
        print(f"  {problem}")
    print(f"{len(problems)} problems" if problems else "all is well")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(run(main))
