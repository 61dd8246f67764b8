"""Pack a data set of Hugging Face into shards: parquet files with an image column and text columns.

python data_prep/huggingface.py --data downloads/birds --out data/birds                  # a folder
python data_prep/huggingface.py --data someone/birds --split train --out data/birds      # read from the hub
python data_prep/huggingface.py --data datasets/mine --caption-columns short long --crop none --out data/mine
python data_prep/huggingface.py --data cifar10 --split train --label-column label --templates "a photo of a {class}" \\
    "a small picture of a {class}" --crop none --out data/cifar10

--data is a folder of parquet files, a folder that datasets' save_to_disk wrote, or the name of a data set on the hub.
From the hub each process reads only the row groups that its shards need. Splits are recognised by the names of files
and folders. The image column is the one that the files declare as such.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from data_prep.folder import PATHS, Listed, add_caption_options, captions_and_conditions, columns_of
from data_prep.importing.conditions import Conditions
from data_prep.importing.conversion import Unit, add_options, options_of, run_pipeline
from data_prep.importing.files import File, walk
from data_prep.importing.tables import columns, declared_images, stretches
from dico_t2i.command import run, script_parser
from dico_t2i.remote import file_system, is_url

IMAGES = ("image", "img", "picture", "jpg", "png", "webp", *PATHS)
KINDS = (".parquet", ".arrow")
_SPLIT = re.compile(r"(?P<split>[A-Za-z_]+?)(?:-\d+-of-\d+|-\d+|_\d+)?$")
_NO_SPLITS = {"data", "part", "default"}  # names of files that belong to no split


@dataclass(frozen=True)
class HuggingFace:
    """The files of one split, in order. name: of the data set; columns: of the image, and of the captions."""

    root: Path
    name: str
    split: str
    files: tuple[Path | str, ...]
    image_column: str
    caption_columns: tuple[str, ...]
    samples_per_shard: int
    conditions: Conditions

    contents: ClassVar[tuple[str, ...]] = ("name", "files")

    @property
    def meta(self) -> dict[str, Any]:
        return {
            "source": "huggingface",
            "name": self.name,
            "split": self.split,
            "files": len(self.files),
            "captions": list(self.caption_columns),
            **self.conditions.describe(),
        }

    def units(self) -> Iterator[Unit]:
        first = 0
        for file in self.files:
            for stretch in stretches(file, self.samples_per_shard, "utf-8"):
                columns = self.image_column, self.caption_columns
                yield Listed(self.root, stretch, *columns, first, conditions=self.conditions)
                first += stretch.count


def source_of(args: argparse.Namespace) -> HuggingFace:
    """The source of a command line. Raises ValueError."""
    place = Path(args.data)
    if place.is_dir():
        root, name, at = place, place.resolve().name, _in_folder(place)
    else:
        root, name, at = Path(), args.data, _on_hub(args.data)
    split, chosen = _of_split(args, {name: split_of(name) for name in at})
    files = tuple(at[name] for name in chosen)
    there = columns(files[0], "utf-8")
    images = [args.image_column] if args.image_column else declared_images(files[0])
    image = columns_of("--image-column", images or None, IMAGES, there)[0]
    captions, conditions = captions_and_conditions(args, there)
    for file in files[1:]:
        columns_of("--image-column", [image], IMAGES, columns(file, "utf-8"))
        captions_and_conditions(args, columns(file, "utf-8"))
    return HuggingFace(root, name, split, files, image, captions, args.samples_per_shard, conditions)


def split_of(name: str) -> str:
    """The split of a file, from its folders and its own name: "plain/train-00000-of-00002.parquet" is of "train"."""
    folders, _, base = name.rpartition("/")
    found = _SPLIT.match(base.rpartition(".")[0])
    own = found["split"].rstrip("_") if found else ""
    if own and own not in _NO_SPLITS:
        return own
    return next((folder for folder in reversed(folders.split("/")) if folder and folder not in _NO_SPLITS), "train")


def _of_split(args: argparse.Namespace, splits: dict[str, str]) -> tuple[str, list[str]]:
    """The requested split, or else the only one, with the names of its files. Raises ValueError."""
    if not splits:
        raise ValueError(f"--data {args.data}: there are no {' or '.join(KINDS)} files")
    there = sorted(set(splits.values()))
    split = args.split or there[0]
    if split not in there:
        raise ValueError(f"--split {split}: not one of {', '.join(there)}")
    if not args.split and len(there) > 1:
        raise ValueError(f"--data {args.data}: it has the splits {', '.join(there)}; choose one with --split")
    return split, sorted(name for name, of in splits.items() if of == split)


def _in_folder(place: Path) -> dict[str, Path | str]:
    """The files of a folder and its subfolders, by their names relative to it."""
    files = (file.name for file in walk(place) if isinstance(file, File))
    return {name: place / name for name in files if name.endswith(KINDS)}


def _on_hub(name: str) -> dict[str, Path | str]:
    """The URLs of the parquet files of a data set on the hub, by their names in it. Raises ValueError."""
    url = name if is_url(name) else f"hf://datasets/{name}"
    try:
        system, path = file_system(url)
        found = sorted(str(file) for file in system.glob(f"{path}/**/*.parquet"))
    except Exception as error:  # the hub's client raises its own errors
        raise ValueError(
            f"--data {name}: there is no such folder, and it cannot be read from the hub: {type(error).__name__}:"
            f" {str(error).splitlines()[0] if str(error) else 'no response'}"
        ) from None
    return {file.removeprefix(path).lstrip("/"): system.unstrip_protocol(file) for file in found}


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="PLACE", help="folder, or name of a data set on the hub")
    add("--split", metavar="NAME", help="split, such as train (default: the only one)")
    add("--image-column", metavar="NAME", help="column of images (default: the declared one, or the first usual name)")
    add_caption_options(parser)
    add_options(parser)
    args = parser.parse_args(argv)
    options_of(args)
    return run_pipeline(source_of(args), args)


if __name__ == "__main__":
    sys.exit(run(main))
