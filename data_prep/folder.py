"""Pack a folder of images with captions into shards.

python data_prep/folder.py --images photos --out data/photos                  # photos/a/1.jpg with photos/a/1.txt
python data_prep/folder.py --images imagefolder --out data/photos             # with metadata.jsonl anywhere in it
python data_prep/folder.py --images photos --table captions.parquet --path-column file --caption-columns short long \\
    --min-field aesthetic=5.0 --out data/photos

Captions are the lines of a text file beside each image, or columns of CSV, TSV, JSON lines or parquet files. Paths in a
table are relative to --images, those in a metadata.jsonl (.csv, .parquet) to its own folder. A parquet column may also
contain the image itself. Other columns of numbers and text are stored in each sample's json, and filters can use them.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from data_prep.importing.captions import check_encoding
from data_prep.importing.conditions import Conditions, add_condition_options, conditions_of
from data_prep.importing.conversion import (
    Raw,
    Unit,
    Unreadable,
    add_options,
    options_of,
    read_image_file,
    run_pipeline,
    state_of,
)
from data_prep.importing.files import EXTENSIONS, File, not_read, place_in, walk
from data_prep.importing.filters import Dropped
from data_prep.importing.tables import BadRow, Row, Stretch, columns, stretches
from dico_t2i.command import run, script_parser
from dico_t2i.data.sample import Caption, captions_in
from dico_t2i.text_lines import decode_text, split_lines

PATHS = ("path", "file_name", "filename", "image", "file")
CAPTIONS = ("captions", "caption", "text")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # tables of an imagefolder


@dataclass(frozen=True)
class Files:
    """Image files with text files beside them. names: relative to root; first: number of the first in the data set."""

    root: Path = field(repr=False)
    names: tuple[str, ...]
    first: int
    encoding: str

    def state(self) -> str:
        files = [self.root / name for name in self.names]
        return "\n".join(f"{state_of(file)} {state_of(file.with_suffix('.txt'))}" for file in files)

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
        except Dropped:
            return []
        try:
            return split_lines(decode_text(data, name, self.encoding))
        except ValueError as error:
            raise Dropped(f"text that is not {self.encoding}", str(error)) from None


@dataclass(frozen=True)
class Walk:
    """The images of a folder and its subfolders, by name, except those that metadata files describe.

    described: names of the excepted images and of the metadata files. first: number of the first in the data set.
    """

    root: Path
    samples_per_shard: int
    encoding: str
    described: frozenset[str] = frozenset()
    first: int = 0

    contents: ClassVar[tuple[str, ...]] = ()

    @property
    def meta(self) -> dict[str, Any]:
        return {"source": "folder", "captions": "txt"}

    def units(self) -> Iterator[Unit]:
        files = (file for file in walk(self.root) if isinstance(file, File))
        names = (file.name for file in files if file.kind == "image" and file.name not in self.described)
        first = self.first
        while chunk := tuple(islice(names, self.samples_per_shard)):
            yield Files(self.root, chunk, first, self.encoding)
            first += len(chunk)

    def noted(self) -> Iterator[Dropped]:
        """Yield files that are skipped, and links that were not followed."""
        for file in walk(self.root):
            if isinstance(file, Dropped):
                yield file
            elif file.kind == "other" and file.name not in self.described:
                yield not_read(file.name)


@dataclass(frozen=True)
class Table:
    """A table that names images and their captions. prefix: begins its paths in the report and in the json."""

    file: Path | str
    root: Path
    prefix: str
    path_column: str
    caption_columns: tuple[str, ...]
    conditions: Conditions


@dataclass(frozen=True)
class Listed:
    """Rows of a table. first: number of the first row in the data set; prefix: begins the names of its images."""

    root: Path = field(repr=False)
    stretch: Stretch
    path_column: str
    caption_columns: tuple[str, ...]
    first: int
    prefix: str = ""
    conditions: Conditions = field(default_factory=Conditions, repr=False)  # part of the meta data

    def state(self) -> str:
        try:
            values = self.stretch.values(self.path_column)
            paths = [value.get("path") if isinstance(value, dict) else value for value in values]
            places = [place_in(self.root, path) for path in paths if isinstance(path, str)]
            return "\n".join([self.stretch.content(), *(state_of(place) if place else "" for place in places)])
        except OSError as error:
            raise Unreadable(f"{self.stretch.name}: {error}") from None

    def read(self, scratch: Path) -> Iterator[Raw | Dropped]:
        try:
            for number, row in enumerate(self.stretch.rows(), self.first):
                try:
                    yield self._raw(f"{number:09d}", row)
                except Dropped as dropped:
                    yield dropped
        except OSError as error:
            raise Unreadable(f"{self.stretch.name}: {error}") from None

    def _raw(self, key: str, row: Row | BadRow) -> Raw:
        if isinstance(row, BadRow):
            raise Dropped("unreadable rows", f"{self.stretch.name}: line {row.line}: {row.reason}")
        image, name = self._image(row.get(self.path_column), f"{self.stretch.name}: row {int(key)}")
        captions, other = list[Caption](), list[str]()
        for column in self.caption_columns:
            found, none = captions_in(_value(row, column))
            captions += [caption._replace(source=column) for caption in found]
            other += none
        texts = [caption.text for caption in captions]
        if not "".join(texts).isascii() and any("\udc80" <= c <= "\udcff" for text in texts for c in text):
            raise Dropped(f"text that is not {self.stretch.encoding}", name)
        filled = self.conditions.templates.captions(int(key), row)
        captions += [Caption(text, "template") for text in filled]
        texts += filled
        several = len(self.caption_columns) + bool(filled) > 1
        sources = [caption.source for caption in captions] if several else []
        rest = {k: v for k, v in row.items() if k not in (self.path_column, *self.caption_columns) and _goes_along(v)}
        label, about = self.conditions.label(row, name), {"file_name": name, **rest}
        return Raw(key, image, name, texts, label, about, sources, other)

    def _image(self, value: Any, row: str) -> tuple[bytes, str]:
        """The bytes of a row's image, and its name. Hugging Face's tables contain {"bytes", "path"}."""
        if isinstance(value, dict):
            value, row = (value.get("bytes") or value.get("path")), str(value.get("path") or row)
        if isinstance(value, bytes):
            return value, row
        if not isinstance(value, str) or not value:
            raise Dropped("rows with several images" if isinstance(value, list) else "rows without an image", row)
        place = place_in(self.root, value)
        if place is None:
            raise Dropped("paths outside --images", value)
        return read_image_file(place, value), self.prefix + value


def _value(row: Row, column: str) -> Any:
    """The value of a column. Dots in its name lead inside: "sentences.raw" is the "raw" of each sentence."""
    if column in row or "." not in column:
        return row.get(column)
    outer, _, inner = column.partition(".")
    value = row.get(outer)
    if isinstance(value, list):
        return [_value(item, inner) for item in value if isinstance(item, dict)]
    return _value(value, inner) if isinstance(value, dict) else value


def _goes_along(value: Any) -> bool:
    """Whether the value of another column is text or a number that JSON can represent."""
    return isinstance(value, str | int | bool) or (isinstance(value, float) and math.isfinite(value))


@dataclass(frozen=True)
class Tables:
    """Tables that name images and their captions, and then the images that no table names."""

    files: tuple[Table, ...]
    samples_per_shard: int
    encoding: str
    rest: Walk | None = None

    contents: ClassVar[tuple[str, ...]] = ("tables",)

    @property
    def meta(self) -> dict[str, Any]:
        return {
            "source": "folder",
            "tables": [
                {"name": f"{table.prefix}{Path(table.file).name}", "bytes": Path(table.file).stat().st_size}
                for table in self.files
            ],
            "captions": list(dict.fromkeys(column for table in self.files for column in table.caption_columns)),
            **self.files[0].conditions.describe(),
        }

    def units(self) -> Iterator[Unit]:
        first = 0
        for table in self.files:
            for stretch in stretches(table.file, self.samples_per_shard, self.encoding):
                yield Listed(
                    table.root,
                    stretch,
                    table.path_column,
                    table.caption_columns,
                    first,
                    table.prefix,
                    table.conditions,
                )
                first += stretch.count
        if self.rest:
            yield from replace(self.rest, first=first).units()

    def noted(self) -> Iterator[Dropped]:
        return self.rest.noted() if self.rest else iter(())


def source_of(args: argparse.Namespace) -> Walk | Tables:
    """The source of a command line. Raises ValueError."""
    check_encoding(args.encoding)
    if not args.images.is_dir():
        raise ValueError(f"--images {args.images}: no such folder")
    if args.table:
        missing = next((file for file in args.table if not file.is_file()), None)
        if missing is not None:
            raise ValueError(f"--table {missing}: no such file")
        tables = tuple(table_of(file, args.images, "", args) for file in args.table)
        return Tables(tables, args.samples_per_shard, args.encoding)
    tables = tuple(_described_in(args))
    rest = Walk(args.images, args.samples_per_shard, args.encoding, frozenset(_names_in(tables, args.encoding)))
    if not tables and next(rest.units(), None) is None:
        raise ValueError(f"--images {args.images}: no images ({', '.join(EXTENSIONS)}) in this folder")
    return Tables(tables, args.samples_per_shard, args.encoding, rest) if tables else rest


def _described_in(args: argparse.Namespace) -> Iterator[Table]:
    """Yield the metadata files anywhere in an imagefolder; their paths are relative to their own folder."""
    for file in walk(args.images):
        if isinstance(file, File) and os.path.basename(file.name) in METADATA:  # noqa: PTH119
            place = args.images / file.name
            if not {args.path_column, *PATHS} & set(columns(place, args.encoding)):
                continue  # it does not describe images
            yield table_of(place, place.parent, file.name.removesuffix(place.name), args)


def _names_in(tables: Sequence[Table], encoding: str) -> Iterator[str]:
    """Yield the images that metadata files name, and these files, relative to the root of the imagefolder."""
    for table in tables:
        yield f"{table.prefix}{Path(table.file).name}"
        for stretch in stretches(table.file, 1 << 30, encoding):
            values = stretch.values(table.path_column)
            yield from (os.path.normpath(table.prefix + value) for value in values if isinstance(value, str))


def table_of(file: Path | str, root: Path, prefix: str, args: argparse.Namespace) -> Table:
    """A table with the columns that a command line selects. Raises ValueError."""
    there = columns(file, args.encoding)
    path = columns_of("--path-column", [args.path_column] if args.path_column else None, PATHS, there)[0]
    captions, conditions = captions_and_conditions(args, there)
    return Table(file, root, prefix, path, captions, conditions)


def captions_and_conditions(args: argparse.Namespace, there: Sequence[str]) -> tuple[tuple[str, ...], Conditions]:
    """The columns of captions, and the other conditions, that a command line selects. Raises ValueError."""
    conditions = conditions_of(args, there)
    if not args.caption_columns and conditions.describe():
        return (), conditions
    return tuple(columns_of("--caption-columns", args.caption_columns, CAPTIONS, there)), conditions


def add_caption_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for captions and classes."""
    parser.add_argument(
        "--caption-columns",
        nargs="+",
        metavar="NAME",
        help=f"columns of captions (default: the first of {', '.join(CAPTIONS)}; none with templates or classes)",
    )
    add_condition_options(parser)


def columns_of(option: str, wanted: Sequence[str] | None, usual: Sequence[str], there: Sequence[str]) -> Sequence[str]:
    """The wanted columns, or else the first usual one that the table has. Raises ValueError."""
    chosen = wanted or [name for name in usual if name in there][:1]
    missing = [name for name in chosen if name not in there and name.partition(".")[0] not in there]
    if missing or not chosen:
        raise ValueError(
            f"{option}: the table has no {', '.join(missing or usual)}; its columns are {', '.join(there)}"
        )
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="folder of the images")
    add("--table", type=Path, nargs="+", metavar="FILE", help=".csv, .tsv, .jsonl, .parquet (default: .txt files)")
    add("--path-column", metavar="NAME", help=f"column of paths (default: the first of {', '.join(PATHS)})")
    add_caption_options(parser)
    add("--encoding", default="utf-8", help="encoding of text without a byte order mark (default: utf-8)")
    add_options(parser)
    args = parser.parse_args(argv)
    options_of(args)
    source = source_of(args)
    return run_pipeline(source, args, source.noted())


if __name__ == "__main__":
    sys.exit(run(main))
