"""Pack MS-COCO images and all their captions into shards.

python data_prep/coco.py --images train2014 --captions annotations/captions_train2014.json --out data/coco

Supports the 2014 and 2017 layouts; --images is the folder of the images or its parent. Images are cropped and resized
as by the loader, or kept byte for byte with --crop none. Everything that is skipped is counted in report.json, with
examples.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from data_prep.importing.conversion import Raw, add_options, options_of, read_image_file, run_pipeline, state_of
from data_prep.importing.files import is_image, place_in
from data_prep.importing.filters import Dropped
from dico_t2i.command import run, script_parser
from dico_t2i.data.sample import captions_in
from dico_t2i.text_lines import read_text

Id = int | str


class AnnotatedImage(NamedTuple):
    """An image in an annotation file. where: the file and the entry, for messages; about: its other fields."""

    id: Id
    file_name: str
    where: str
    about: Mapping[str, Any]


class Annotation(NamedTuple):
    """A caption in an annotation file. It may have any value; ``captions_in`` finds the text in it."""

    id: Id
    image_id: Id
    caption: Any


class Annotations(NamedTuple):
    """The content of an annotation file: images by id, and captions in order."""

    file: Path
    images: dict[Id, AnnotatedImage]
    captions: list[Annotation]


class Record(NamedTuple):
    """An image with its annotations. place: its file, in the folder of images."""

    key: str
    place: str
    image_id: Id
    file_name: str
    captions: list[str]
    other: list[str]


@dataclass(frozen=True)
class Records:
    """The images of one shard."""

    root: Path = field(repr=False)
    records: tuple[Record, ...]

    def state(self) -> str:
        return "\n".join(state_of(self.root / record.place) for record in self.records)

    def read(self, scratch: Path) -> Iterator[Raw | Dropped]:
        for record in self.records:
            about = {"image_id": record.image_id, "file_name": record.file_name}
            try:
                image = read_image_file(self.root / record.place, record.file_name)
                yield Raw(record.key, image, record.file_name, record.captions, about=about, other=record.other)
            except Dropped as dropped:
                yield dropped


def read_annotations(file: Path) -> Annotations:
    """Read a COCO caption file. Ids that are numbers, or strings of digits, become numbers.

    Raises ValueError, with file, entry and field, if it is not such a file or if two of its entries have the same id.
    """
    if not file.is_file():
        raise ValueError(f"--captions {file}: no such file")
    try:
        content = json.loads(read_text(file))
        if not isinstance(content, dict):
            raise TypeError("not an object")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"--captions {file}: it is not a COCO annotation file: {error!r}") from None
    images: dict[Id, AnnotatedImage] = {}
    for where, entry in _entries(file, content, "images"):
        image = AnnotatedImage(_id(where, entry, "id"), _text(where, entry, "file_name"), where, entry)
        earlier = images.setdefault(image.id, image)
        if earlier.file_name != image.file_name:
            raise ValueError(
                f"{where}: id {image.id!r} of {image.file_name!r} is also the id of {earlier.file_name!r},"
                f" {earlier.where}"
            )
    captions: dict[Id, Annotation] = {}
    for where, entry in _entries(file, content, "annotations"):
        note = Annotation(_id(where, entry, "id"), _id(where, entry, "image_id"), entry.get("caption"))
        if captions.setdefault(note.id, note) != note:
            raise ValueError(
                f"{where}: id {note.id!r} is also the id of a different annotation, of image"
                f" {captions[note.id].image_id!r}"
            )
    if not any("caption" in entry for _, entry in _entries(file, content, "annotations")):
        raise ValueError(f"--captions {file}: it has no captions; expected a captions_*.json file")
    return Annotations(file, images, list(captions.values()))


def _entries(file: Path, content: dict[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the entries of a list, each with its name for messages."""
    if not isinstance(content.get(name), list):
        raise ValueError(f"--captions {file}: it is not a COCO annotation file, because {name!r} is not a list")
    for number, entry in enumerate(content[name]):
        where = f"--captions {file}: {name}[{number}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: it is not an object")
        yield where, entry


def _id(where: str, entry: dict[str, Any], name: str) -> Id:
    value = entry.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ValueError(f"{where}: {name} is {value!r}; expected a number or a text")
    return value


def _text(where: str, entry: dict[str, Any], name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: {name} is {value!r}; expected a text")
    return value


def match(images_folder: Path, files: Sequence[Path]) -> tuple[list[Record], list[Dropped]]:
    """The images that have a file and a caption, by id, and everything that is skipped.

    Ids are looked up in their own annotation file. An image that has the same file name in several annotation files
    gets the captions of all. Raises ValueError if the folder is missing, no image matches, or two images have the same
    file.
    """
    if not images_folder.is_dir():
        raise ValueError(f"--images {images_folder}: no such folder")
    contents, places = [read_annotations(file) for file in files], Places(images_folder)
    noted: list[Dropped] = []
    found: dict[str, tuple[AnnotatedImage, int, list[str], list[str]]] = {}
    for number, content in enumerate(contents):
        captions = _captions_by_image(content, noted)
        for image in content.images.values():
            place = places.find(image.file_name, image.where)
            if isinstance(place, Dropped):
                noted.append(place)
                continue
            first, _, texts, other = found.setdefault(place, (image, number, [], []))
            if first.file_name != image.file_name:
                raise ValueError(
                    f"{image.where}: {image.file_name!r} is the same file as {first.file_name!r}, {first.where}"
                )
            texts += captions[image.id][0]
            other += captions[image.id][1]
    noted += [Dropped("images that are not in the annotations", place) for place in places.unused(found)]
    repeated = max(Counter(image.id for image, *_ in found.values()).values(), default=0) > 1
    records = []
    for place, (image, number, texts, other) in sorted(found.items(), key=lambda item: _order(item[1])):
        key = f"{image.id:012d}" if isinstance(image.id, int) else image.id.replace("/", "%2F")
        if texts:
            key = f"{number}-{key}" if repeated else key
            records.append(Record(key, place, image.id, image.file_name, texts, other))
        else:
            why = f"{image.file_name}: {', '.join(other)} instead" if other else image.file_name
            noted.append(Dropped("images without captions", why))
    if not records:
        total = sum(len(content.images) for content in contents)
        example = next((image.file_name for content in contents for image in content.images.values()), "none")
        raise ValueError(
            f"--images {images_folder}: none of the {total} annotated images has a file there and a caption; names such"
            f" as {example} were looked up in the folder and in its direct subfolders"
        )
    return records, noted


def _order(found: tuple[AnnotatedImage, int, list[str], list[str]]) -> tuple[int, bool, int, str]:
    image, number = found[0], found[1]
    is_text = isinstance(image.id, str)
    return number, is_text, 0 if isinstance(image.id, str) else image.id, str(image.id)


def _captions_by_image(content: Annotations, noted: list[Dropped]) -> dict[Id, tuple[list[str], list[str]]]:
    """The captions of each image that are not blank, and what its other captions are instead of text."""
    captions: dict[Id, tuple[list[str], list[str]]] = {image: ([], []) for image in content.images}
    for note in content.captions:
        if note.image_id not in captions:
            noted.append(Dropped("captions of images not in the annotations", str(note.image_id), part=True))
            continue
        found, other = captions_in(note.caption)
        texts = [" ".join(caption.text.split()) for caption in found]
        captions[note.image_id][0].extend(text for text in texts if text)
        captions[note.image_id][1].extend(other)
    return captions


class Places:
    """Finds the images of annotations, in a folder and its direct subfolders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_name: dict[str, list[str]] = {}
        for inner in ["", *sorted(path.name for path in root.iterdir() if path.is_dir())]:
            with os.scandir(root / inner) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    place = f"{inner}/{entry.name}" if inner else entry.name
                    self._by_name.setdefault(entry.name, []).append(place)

    def find(self, file_name: str, where: str) -> str | Dropped:
        """The place of an image, relative to the folder if the image is inside.

        where: the entry that names the image. Raises ValueError if several files fit.
        """
        name = file_name if "/" in file_name else file_name.replace("\\", "/")
        *folders, base = [part for part in name.split("/") if part != "."]
        if name.startswith("/") or ".." in folders:
            place = place_in(self.root, name)
            if place is None:
                return Dropped("paths outside --images", file_name)
            return str(place) if place.is_file() else Dropped("missing image files", file_name)
        if (self.root / name).is_file():
            return "/".join([*folders, base])
        found = self._by_name.get(base, [])
        if folders:  # the given folder may be the one that begins the name, or the parent of that one
            found = [place for place in found if place == base or place.split("/")[0] == folders[-1]]
        if len(found) > 1:
            raise ValueError(
                f"{where}: {file_name!r} may be {found[0]} or {found[1]} of --images {self.root}; give the folder of"
                " one of them, or write the folder before the name"
            )
        return found[0] if found else Dropped("missing image files", file_name)

    def unused(self, used: Container[str]) -> Iterator[str]:
        """Yield the image files in the searched folders that no annotation names."""
        for places in self._by_name.values():
            yield from (place for place in places if place not in used and is_image(place))


@dataclass(frozen=True)
class Coco:
    """The images that have a file and a caption, in shards by id."""

    root: Path
    records: list[Record]
    samples_per_shard: int
    meta: dict[str, Any]

    contents: ClassVar[tuple[str, ...]] = ("images", "captions")

    def units(self) -> Iterator[Records]:
        for start in range(0, len(self.records), self.samples_per_shard):
            yield Records(self.root, tuple(self.records[start : start + self.samples_per_shard]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="folder of the images, or its parent")
    add("--captions", type=Path, required=True, nargs="+", metavar="JSON", help="COCO caption annotations")
    add_options(parser)
    parser.set_defaults(odd_captions=True)  # COCO's captions were written by people who saw the image
    args = parser.parse_args(argv)
    options_of(args)
    records, noted = match(args.images, args.captions)
    meta = {"source": "coco", "captions": [file.name for file in args.captions], "images": len(records)}
    return run_pipeline(Coco(args.images, records, args.samples_per_shard, meta), args, noted)


if __name__ == "__main__":
    sys.exit(run(main))
