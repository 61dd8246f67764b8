"""Pack ImageNet into shards, with class numbers.

python data_prep/imagenet.py --images ILSVRC/train --names LOC_synset_mapping.txt --out data/imagenet256
python data_prep/imagenet.py --images ILSVRC2012_img_train.tar --out data/imagenet256
python data_prep/imagenet.py --images ILSVRC/val --val-labels LOC_val_solution.csv --out data/imagenet256_val

--images is a folder of class folders (n01440764/*.JPEG) or of class tars, the tar of class tars, or, with --val-labels,
a folder or tar of images. Tars are read in place. Classes are numbered by their sorted names, which are those in
--names or else those of the images. Images are in a fixed random order, so that every shard has all classes.
"""

import os
import re
import sys
import tarfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from data_prep.importing.conversion import (
    MAX_FILE,
    Raw,
    add_options,
    options_of,
    read_image_file,
    run_pipeline,
    state_of,
)
from data_prep.importing.files import is_image, not_read, walk
from data_prep.importing.filters import Dropped
from dico_t2i.command import run, script_parser
from dico_t2i.data.tar import compression
from dico_t2i.text_lines import read_lines

SYNSET = re.compile(r"n\d{8}")


class Place(NamedTuple):
    """The place of an image. file: relative to the root; offset: in that file, or -1 if the image is the whole file."""

    file: str
    offset: int
    size: int
    name: str
    label: int
    synset: str
    key: str


@dataclass(frozen=True)
class Images:
    """Some images of the set. words: names of the classes by synset, if known."""

    root: Path = field(repr=False)
    places: tuple[Place, ...]
    words: Mapping[str, str]

    def state(self) -> str:
        files = dict.fromkeys(place.file for place in self.places)
        return "\n".join(state_of(self.root / file if file else self.root) for file in files)

    def read(self, scratch: Path) -> Iterator[Raw | Dropped]:
        for place in self.places:
            about = {"synset": place.synset, "name": self.words.get(place.synset, ""), "file_name": place.name}
            try:
                yield Raw(place.key, self._image(place), place.name, label=place.label, about=about)
            except Dropped as dropped:
                yield dropped

    def _image(self, place: Place) -> bytes:
        path = self.root / place.file if place.file else self.root
        if place.offset < 0:
            return read_image_file(path, place.file)
        try:
            with path.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), place.size, place.offset)
        except OSError as error:
            raise Dropped("unreadable image files", f"{place.name}: {error}") from None
        if len(data) != place.size:
            raise Dropped("images cut off by the end of a tar", place.name)
        return data


class Listing:
    """A list of images, stored as columns: a million of them take some 100 MB."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.synsets: list[str] = []
        self.names: list[str] = []
        self._columns = {name: array("q") for name in ("file", "offset", "size", "synset")}
        self.noted: list[Dropped] = []

    def add(self, file: str, offset: int, size: int, name: str, synset: str) -> None:
        for column, value, of in (("file", file, self.files), ("synset", synset, self.synsets)):
            if not of or of[-1] != value:
                of.append(value)
            self._columns[column].append(len(of) - 1)
        self._columns["offset"].append(offset)
        self._columns["size"].append(size)
        self.names.append(name)

    def synset(self, number: int) -> str:
        return self.synsets[self._columns["synset"][number]]

    def place(self, number: int, classes: Mapping[str, int], key: str) -> Place:
        file, offset, size, synset = (column[number] for column in self._columns.values())
        named = self.synsets[synset]
        return Place(self.files[file], offset, size, self.names[number], classes[named], named, key)


def list_training(images: Path) -> Listing:
    """List the images of class folders, class tars, or a tar of class tars. Raises ValueError if there are none."""
    listing = Listing()
    if images.is_file():
        with _tar(images) as outer:
            for member in _regular(outer, images.name, listing):
                if SYNSET.fullmatch(Path(member.name).stem):
                    _list_tar(outer.extractfile(member), images.name, "", member.offset_data, listing, member.name)
                else:
                    listing.noted.append(Dropped("files that are not of a class", f"{images.name}: {member.name}"))
    else:
        _list_folder(images, listing)
    if not listing.names:
        raise ValueError(f"--images {images}: there are no images in folders or tars named by class, such as n01440764")
    return listing


def _list_folder(images: Path, listing: Listing) -> None:
    for file in walk(images):
        synset, slash, inner = ("", "", "") if isinstance(file, Dropped) else file.name.partition("/")
        if isinstance(file, Dropped):
            listing.noted.append(file)
        elif slash and SYNSET.fullmatch(synset) and file.kind == "image":
            listing.add(file.name, -1, 0, inner, synset)
        elif not slash and file.name.endswith(".tar") and SYNSET.fullmatch(Path(file.name).stem):
            with (images / file.name).open("rb") as opened:
                _list_tar(opened, file.name, file.name, 0, listing, file.name)
        elif file.kind == "image":
            listing.noted.append(Dropped("files that are not of a class", file.name))
        else:
            listing.noted.append(not_read(file.name))


def list_validation(images: Path, labels: Path) -> Listing:
    """List the images of a folder or tar with their classes from a file. Raises ValueError if the two do not match."""
    listing = Listing()
    found: list[tuple[str, str, int, int]] = []  # name, place, offset, size
    if images.is_file():
        with _tar(images) as tar:
            for member in _regular(tar, images.name, listing):
                _find(Path(member.name).name, ("", member.offset_data, member.size), found, listing)
    else:
        for file in walk(images):
            if isinstance(file, Dropped):
                listing.noted.append(file)
            else:
                _find(Path(file.name).name, (file.name, -1, 0), found, listing)
    found.sort()
    for one, other in pairwise(found):
        if one[0] == other[0]:
            raise ValueError(f"--images {images}: two images are named {one[0]!r}: {one[1]} and {other[1]}")
    synsets = _read_labels(labels)
    for number, (name, place, offset, size) in enumerate(found):
        synset = synsets.get(Path(name).stem) or synsets.get(str(number))
        if synset is None:
            listing.noted.append(Dropped("images without a label", name))
        else:
            listing.add(place, offset, size, name, synset)
    if not listing.names:
        raise ValueError(f"--images {images}: none of {len(found)} images has a class in --val-labels {labels}")
    return listing


def _find(name: str, place: tuple[str, int, int], found: list[tuple[str, str, int, int]], listing: Listing) -> None:
    if is_image(name):
        found.append((name, *place))
    else:
        listing.noted.append(not_read(name))


def _read_labels(file: Path) -> dict[str, str]:
    """The synset of each image, by its name, or by its number if the lines contain a synset alone."""
    found: dict[str, str] = {}
    for number, line in enumerate(read_lines(file)):
        words = [word for word in re.split(r"[,\s]+", line) if word]
        synset = next((word for word in words if SYNSET.fullmatch(word)), None)
        if synset is not None:
            key = str(len(found)) if words[0] == synset else Path(words[0]).stem
            if found.setdefault(key, synset) != synset:
                raise ValueError(
                    f"--val-labels {file}: line {number + 1}: {key} has two classes, {found[key]} and {synset}"
                )
        elif words and number:
            raise ValueError(
                f"--val-labels {file}: line {number + 1} does not name a class such as n01440764 ({line[:40]!r});"
                " numbers are not accepted, because ILSVRC's own numbers are not the class numbers that models use"
            )
    return found


def _tar(path: Path) -> tarfile.TarFile:
    with path.open("rb") as file:
        if program := compression(file):
            raise ValueError(
                f"--images {path}: it is compressed ({program}); unpack it, because tars are read in place"
            )
    try:
        return tarfile.open(path, "r:")
    except tarfile.TarError as error:
        raise ValueError(f"--images {path}: it is not a readable tar: {error}") from None


def _list_tar(file: Any, name: str, relative: str, base: int, listing: Listing, label: str) -> None:
    """Add the images of a class tar that begins at byte ``base`` of a file."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _regular(tar, label, listing):
                if is_image(member.name):
                    place = (base + member.offset_data, member.size, member.name)
                    listing.add(relative, *place, Path(label).stem)
                else:
                    listing.noted.append(not_read(f"{label}: {member.name}"))
    except tarfile.TarError as error:
        listing.noted.append(Dropped("damaged archives", f"{name}: {label}: {error}"))


def _regular(tar: tarfile.TarFile, label: str, listing: Listing) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of a tar, as far as it can be read; its other members, except folders, are noted."""
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all
            where = f"{label}: {member.name}"
            if not member.isreg() or member.issparse():
                if not member.isdir():
                    listing.noted.append(Dropped("links, devices and sparse files in tars", where))
            elif member.size > MAX_FILE and not member.name.endswith(".tar"):
                listing.noted.append(Dropped("not image files", where))
            else:
                yield member
    except Exception as error:  # a malicious header can make tarfile raise almost any error
        listing.noted.append(Dropped("damaged archives", f"{label}: {error}"))


def read_names(file: Path) -> dict[str, str]:
    """The names of the classes by synset, from lines such as "n01440764 tench, Tinca tinca". Raises ValueError."""
    found: dict[str, str] = {}
    for number, line in enumerate(read_lines(file), 1):
        synset, _, words = line.strip().partition(" ")
        if not synset:
            continue
        if not SYNSET.fullmatch(synset):
            raise ValueError(
                f"--names {file}: line {number}: expected a line such as 'n01440764 tench, Tinca tinca', found"
                f" {line[:40]!r}"
            )
        if found.setdefault(synset, words.strip()) != words.strip():
            raise ValueError(
                f"--names {file}: line {number}: {synset} has two names, {found[synset]} and {words.strip()}"
            )
    return found


def _keys(listing: Listing) -> list[str]:
    """A key for each image: its file's name, preceded by the class if names repeat, or else by its number."""
    stems = [Path(name).stem for name in listing.names]
    if len(set(stems)) == len(stems):
        return stems
    named = [f"{listing.synset(number)}-{stem}" for number, stem in enumerate(stems)]
    return named if len(set(named)) == len(named) else [f"{number:09d}-{stem}" for number, stem in enumerate(stems)]


class ImageNet:
    """The images in a fixed random order."""

    contents: ClassVar[tuple[str, ...]] = ("images",)

    def __init__(self, root: Path, listing: Listing, names: Mapping[str, str], samples_per_shard: int) -> None:
        there = set(listing.synsets)
        unknown = sorted(there - set(names)) if names else []
        if unknown:
            raise ValueError(f"--names: it lacks {', '.join(unknown[:5])}, but there are images of them")
        self.root, self.listing, self.samples_per_shard = root, listing, samples_per_shard
        self.words = dict(names)
        self.classes = {synset: number for number, synset in enumerate(sorted(names or there))}
        self.meta = {"source": "imagenet", "classes": len(self.classes), "images": len(listing.names)}
        self._keys = _keys(listing)
        from dico_t2i import randomness  # imports torch, for which --help would wait

        self._order = randomness.permutation(0, "imagenet", 0, len(listing.names))

    def units(self) -> Iterator[Images]:
        for start in range(0, len(self._order), self.samples_per_shard):
            chosen = np.asarray(self._order[start : start + self.samples_per_shard]).tolist()
            places = tuple(self.listing.place(number, self.classes, self._keys[number]) for number in chosen)
            yield Images(self.root, places, {place.synset: self.words.get(place.synset, "") for place in places})


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="PLACE", help="folder or tar of the images")
    add("--names", type=Path, metavar="FILE", help="class names, such as LOC_synset_mapping.txt")
    add("--val-labels", type=Path, metavar="FILE", help="the class of each image, such as LOC_val_solution.csv")
    add_options(parser)
    args = parser.parse_args(argv)
    options_of(args)
    for option in ("images", "names", "val_labels"):
        path = getattr(args, option)
        if path is not None and not path.exists():
            raise ValueError(f"--{option.replace('_', '-')} {path}: it does not exist")
    names = read_names(args.names) if args.names else {}
    listing = list_validation(args.images, args.val_labels) if args.val_labels else list_training(args.images)
    source = ImageNet(args.images, listing, names, args.samples_per_shard)
    print(f"{args.images}: {len(listing.names)} images of {len(source.classes)} classes")
    return run_pipeline(source, args, listing.noted)


if __name__ == "__main__":
    sys.exit(run(main))
