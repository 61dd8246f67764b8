"""Pack a folder of images with captions into shards.

python data_prep/folder.py --images photos --out data/photos                  # photos/a/1.jpg with photos/a/1.txt
python data_prep/folder.py --images photos --table captions.parquet --path-column file --caption-columns short long \\
    --min-field aesthetic=5.0 --out data/photos

Captions are the lines of a text file beside each image, or columns of CSV, TSV, JSON lines or parquet files. Paths
in a table are relative to --images; a parquet column may hold the image itself. Other columns of numbers and text
go along in each sample's json, and filters can ask for them.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from data_prep.importing.captions import check_encoding, decode
from data_prep.importing.conversion import (
    EXTENSIONS,
    Raw,
    Unit,
    Unreadable,
    add_options,
    options_of,
    read_image_file,
    run_pipeline,
)
from data_prep.importing.filters import Dropped
from data_prep.importing.tables import Row, Stretch, columns, stretches
from dico_t2i.command import run, script_parser
from dico_t2i.text_lines import split_lines

PATHS = ("path", "file_name", "filename", "image", "file")
CAPTIONS = ("captions", "caption", "text")


@dataclass(frozen=True)
class Files:
    """Image files with text beside them. names: relative to root; first: number of the first in the data set."""

    root: Path = field(repr=False)
    names: tuple[str, ...]
    first: int
    encoding: str

    def read(self, scratch: Path) -> Iterator[Raw | Dropped]:
        for number, name in enumerate(self.names, self.first):
            try:
                image = read_image_file(self.root / name, name)
                yield Raw(f"{number:09d}", image, name, self._captions(name), about={"file_name": name})
            except Dropped as dropped:
                yield dropped

    def _captions(self, name: str) -> list[str]:
        """The lines of the text file; none if there is no such file."""
        try:
            data = read_image_file((self.root / name).with_suffix(".txt"), name)
            return split_lines(decode(data, self.encoding))
        except UnicodeDecodeError:
            raise Dropped(f"text that is not {self.encoding}", name) from None
        except Dropped:
            return []


@dataclass(frozen=True)
class Walk:
    """All images of a folder and the folders in it, by name; only one folder's names are in memory at a time."""

    root: Path
    samples_per_shard: int
    encoding: str

    @property
    def meta(self) -> dict[str, Any]:
        return {"source": "folder", "captions": "txt"}

    def units(self) -> Iterator[Unit]:
        names, first = self._names(self.root), 0
        while chunk := tuple(islice(names, self.samples_per_shard)):
            yield Files(self.root, chunk, first, self.encoding)
            first += len(chunk)

    def _names(self, folder: Path) -> Iterator[str]:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
        for name, is_folder in found:
            if is_folder:
                yield from self._names(folder / name)
            elif name.lower().endswith(EXTENSIONS):
                yield str((folder / name).relative_to(self.root))


@dataclass(frozen=True)
class Listed:
    """Rows of a table. first: number of the first row in the data set."""

    root: Path = field(repr=False)
    stretch: Stretch
    path_column: str
    caption_columns: tuple[str, ...]
    first: int

    def read(self, scratch: Path) -> Iterator[Raw | Dropped]:
        try:
            for number, row in enumerate(self.stretch.rows(), self.first):
                try:
                    yield self._raw(f"{number:09d}", row)
                except Dropped as dropped:
                    yield dropped
        except OSError as error:
            raise Unreadable(str(error)) from None

    def _raw(self, key: str, row: Row | None) -> Raw:
        if row is None:
            raise Dropped("unreadable rows", f"{self.stretch.name}: row {int(key)}")
        image, name = self._image(row.get(self.path_column), f"{self.stretch.name}: row {int(key)}")
        texts: list[str] = []
        for column in self.caption_columns:
            value = row.get(column)
            texts += [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        if not "".join(texts).isascii() and any("\udc80" <= c <= "\udcff" for text in texts for c in text):
            raise Dropped(f"text that is not {self.stretch.encoding}", name)
        other = {k: v for k, v in row.items() if k not in (self.path_column, *self.caption_columns)}
        about = {k: v for k, v in other.items() if isinstance(v, str | int | float | bool)}
        return Raw(key, image, name, texts, about={"file_name": name, **about})

    def _image(self, value: Any, row: str) -> tuple[bytes, str]:
        """The bytes of a row's image and its name. Hugging Face's tables hold {"bytes", "path"}."""
        if isinstance(value, dict):
            value, row = (value.get("bytes") or value.get("path")), str(value.get("path") or row)
        if isinstance(value, bytes):
            return value, row
        if not isinstance(value, str) or not value:
            raise Dropped("rows without an image", row)
        path = os.path.normpath(self.root / value)
        if not path.startswith(os.path.join(os.path.normpath(self.root), "")):  # noqa: PTH118 text, not a file
            raise Dropped("paths outside --images", value)
        return read_image_file(Path(path), value), value


@dataclass(frozen=True)
class Tables:
    """Tables that name images and their captions."""

    root: Path
    files: tuple[Path, ...]
    path_column: str
    caption_columns: tuple[str, ...]
    samples_per_shard: int
    encoding: str

    @property
    def meta(self) -> dict[str, Any]:
        return {
            "source": "folder",
            "tables": [{"name": file.name, "bytes": file.stat().st_size} for file in self.files],
            "captions": list(self.caption_columns),
        }

    def units(self) -> Iterator[Unit]:
        first = 0
        for file in self.files:
            for stretch in stretches(file, self.samples_per_shard, self.encoding):
                yield Listed(self.root, stretch, self.path_column, self.caption_columns, first)
                first += stretch.count


def source_of(args: argparse.Namespace) -> Walk | Tables:
    """The source of a command line. Raises ValueError."""
    check_encoding(args.encoding)
    if not args.images.is_dir():
        raise ValueError(f"--images {args.images}: no such folder")
    if not args.table:
        walk = Walk(args.images, args.samples_per_shard, args.encoding)
        if next(walk.units(), None) is None:
            raise ValueError(f"--images {args.images}: no images ({', '.join(EXTENSIONS)}) in this folder")
        return walk
    for file in args.table:
        if not file.is_file():
            raise ValueError(f"--table {file}: no such file")
    there = columns(args.table[0], args.encoding)
    path = _columns("--path-column", [args.path_column] if args.path_column else None, PATHS, there)[0]
    captions = _columns("--caption-columns", args.caption_columns, CAPTIONS, there)
    return Tables(args.images, tuple(args.table), path, tuple(captions), args.samples_per_shard, args.encoding)


def _columns(option: str, wanted: Sequence[str] | None, usual: Sequence[str], there: Sequence[str]) -> Sequence[str]:
    """The wanted columns, or the first of the usual ones that is there. Raises ValueError."""
    chosen = wanted or [name for name in usual if name in there][:1]
    missing = [name for name in chosen if name not in there]
    if missing or not chosen:
        raise ValueError(f"{option}: no {', '.join(missing or usual)} in the table; it has {', '.join(there)}")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="folder of the images")
    add("--table", type=Path, nargs="+", metavar="FILE", help=".csv, .tsv, .jsonl, .parquet (default: .txt beside)")
    add("--path-column", metavar="NAME", help=f"of the table (default: the first of {', '.join(PATHS)})")
    add("--caption-columns", nargs="+", metavar="NAME", help=f"(default: the first of {', '.join(CAPTIONS)})")
    add("--encoding", default="utf-8", help="of text without a byte order mark (default: utf-8)")
    add_options(parser)
    args = parser.parse_args(argv)
    options_of(args)
    return run_pipeline(source_of(args), args)


if __name__ == "__main__":
    sys.exit(run(main))
