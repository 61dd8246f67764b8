"""Pack MS-COCO images and all their captions into shards.

python data_prep/coco.py --images train2014 --captions annotations/captions_train2014.json --out data/coco

Takes the 2014 and 2017 layouts; --images is the folder of the images or its parent. Images are cropped and
resized as the loader would do it, or kept byte for byte with --crop none. What could not be used is counted,
with examples, in report.json.
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from data_prep.importing.conversion import Raw, add_options, options_of, read_image_file, run_pipeline
from data_prep.importing.filters import Dropped
from dico_t2i.command import run, script_parser


class Record(NamedTuple):
    """An image with what the annotations say of it. place: its file, in the folder of images."""

    place: str
    image_id: int
    file_name: str
    width: int
    height: int
    captions: list[str]


@dataclass(frozen=True)
class Records:
    """The images of a shard."""

    root: Path = field(repr=False)
    records: tuple[Record, ...]

    def read(self, scratch: Path) -> Iterator[Raw | Dropped]:
        for record in self.records:
            about = {name: getattr(record, name) for name in ("image_id", "file_name", "width", "height")}
            try:
                image = read_image_file(self.root / record.place, record.file_name)
                yield Raw(f"{record.image_id:012d}", image, record.file_name, record.captions, about=about)
            except Dropped as dropped:
                yield dropped


def read_annotations(files: Sequence[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Images and caption annotations of COCO caption files. Raises ValueError if a file is not one."""
    from pycocotools.coco import COCO

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"--captions {file}: no such file")
        coco = COCO()
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            # Without the categories that some caption files name, and which COCO() expects captions to have.
            coco.dataset = {name: content[name] for name in ("images", "annotations")}
            with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress with print
                coco.createIndex()
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--captions {file}: not a COCO annotation file: {error!r}") from None
        if not any("caption" in item for item in coco.anns.values()):
            raise ValueError(f"--captions {file}: has no captions; expected a captions_*.json")
        images += coco.imgs.values()
        annotations += coco.anns.values()
    return images, annotations


def match(images_folder: Path, files: Sequence[Path]) -> tuple[list[Record], list[Dropped]]:
    """The images that have a file and a caption, by id, and what was left out.

    Raises ValueError if the folder is missing or no image matches.
    """
    if not images_folder.is_dir():
        raise ValueError(f"--images {images_folder}: no such folder")
    images, annotations = read_annotations(files)
    noted = []
    captions: dict[int, list[str]] = {image["id"]: [] for image in images}
    for item in annotations:
        text = " ".join(str(item.get("caption", "")).split())
        if item["image_id"] not in captions:
            noted.append(Dropped("captions of images not in the annotations", str(item["image_id"])))
        elif text:
            captions[item["image_id"]].append(text)
    found = _files_by_name(images_folder)
    records = []
    for _, image in sorted({image["id"]: image for image in images}.items()):
        name = image["file_name"]
        if name not in found:
            noted.append(Dropped("missing image files", name))
        elif not captions[image["id"]]:
            noted.append(Dropped("images without captions", name))
        else:
            size = (image.get("width", 0), image.get("height", 0))
            records.append(Record(found[name], image["id"], name, *size, captions[image["id"]]))
    if not records:
        example = images[0]["file_name"] if images else "none"
        raise ValueError(
            f"--images {images_folder}: not one of {len(images)} annotated images is there with a caption;"
            f" looked for names such as {example} in the folder and the folders directly in it"
        )
    return records, noted


def _files_by_name(folder: Path) -> dict[str, str]:
    """Files of a folder and of the folders directly in it: their places in it, by name."""
    found = {}
    for inner in [*sorted(path.name for path in folder.iterdir() if path.is_dir()), ""]:
        with os.scandir(folder / inner) as entries:
            found.update({entry.name: f"{inner}/{entry.name}" if inner else entry.name for entry in entries})
    return found


@dataclass(frozen=True)
class Coco:
    """The images that have a file and a caption, in shards by id."""

    root: Path
    records: list[Record]
    samples_per_shard: int
    meta: dict[str, Any]

    def units(self) -> Iterator[Records]:
        for start in range(0, len(self.records), self.samples_per_shard):
            yield Records(self.root, tuple(self.records[start : start + self.samples_per_shard]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="folder of the images, or its parent")
    add("--captions", type=Path, required=True, nargs="+", metavar="JSON", help="COCO caption annotations")
    add_options(parser)
    parser.set_defaults(odd_captions=True)  # they were written by people who saw the image
    args = parser.parse_args(argv)
    options_of(args)
    records, noted = match(args.images, args.captions)
    meta = {"source": "coco", "captions": [file.name for file in args.captions], "images": len(records)}
    return run_pipeline(Coco(args.images, records, args.samples_per_shard, meta), args, noted)


if __name__ == "__main__":
    sys.exit(run(main))
