"""Reads rows of CSV, JSON lines, parquet and arrow files, in stretches that can be read independently.

A table is scanned once without keeping its rows; only the beginning of each stretch stays in memory. CSV is parsed
strictly: a row that cannot be parsed is reported with its line, and a quote that is never closed is an error.
"""

import csv
import hashlib
import itertools
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dico_t2i.remote import base_name, file_system, is_url
from dico_t2i.text_lines import encoding_of

LONGEST_LINE = 1 << 24  # bytes; the rest of a longer line counts as another line, which cannot be parsed
KINDS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".arrow")
_BINARY = (".parquet", ".arrow")
_LOOKED_AT = 1000  # rows of JSON lines that are read to find the columns
_CHUNK = 1 << 20

Row = dict[str, Any]


class BadRow(NamedTuple):
    """A row that cannot be parsed. line: its number in the file, from 1."""

    line: int
    reason: str


class _Line(NamedTuple):
    """A line without its end; end: the position of the next byte; number: from 1."""

    content: bytes
    end: int
    number: int


class _Read(NamedTuple):
    """A row, the position of the byte after it, and the number of the line after it."""

    row: Row | BadRow
    end: int
    line: int


@dataclass(frozen=True)
class Stretch:
    """A number of consecutive rows of a table, which is a file or the URL of one.

    start, end: positions in bytes in a text; (row group, row in it) and None in a parquet or arrow file. line: number
    of the first line of a text, which has this encoding. columns: those of a CSV.
    """

    file: Path | str = field(repr=False)
    name: str
    start: int | tuple[int, int]
    count: int
    columns: tuple[str, ...] = ()
    encoding: str = "utf-8"
    line: int = 1
    end: int | None = None

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield the rows. Raises OSError if the file cannot be read."""
        if isinstance(self.start, tuple):
            yield from _binary_rows(self.file, *self.start, self.count)
            return
        with Path(self.file).open("rb") as file:
            file.seek(self.start)
            yield from (read.row for read in itertools.islice(_text_rows(file, self), self.count))

    def values(self, column: str) -> Iterator[Any]:
        """Yield a column of the rows, reading no other one of a parquet file; nothing if that column is not text."""
        if not isinstance(self.start, tuple):
            yield from (row.get(column) for row in self.rows() if not isinstance(row, BadRow))
        elif _is_text(_schema(self.file), column):
            yield from (row[column] for row in _binary_rows(self.file, *self.start, self.count, [column]))

    def content(self) -> str:
        """A text that changes with the rows: a hash of their bytes, or the size and time or ETag of a parquet file."""
        if isinstance(self.start, int) and self.end is not None:
            with Path(self.file).open("rb") as file:
                file.seek(self.start)
                return hashlib.sha256(file.read(self.end - self.start)).hexdigest()
        if isinstance(self.file, str):
            system, path = file_system(self.file)
            about = system.info(path)
            return f"{about.get('size')} {about.get('ETag') or about.get('blob_id')}"
        status = self.file.stat()
        return f"{status.st_size} {status.st_mtime_ns}"


def stretches(file: Path | str, count: int, encoding: str) -> Iterator[Stretch]:
    """Yield a table in stretches of ``count`` rows.

    Raises ValueError if it is not of a known kind, has no usable header, or has a quote that is never closed.
    """
    kind = _kind(file)
    if kind in _BINARY:
        return _binary_stretches(file, count)
    with Path(file).open("rb") as opened:
        encoding, mark = encoding_of(opened.read(4), _with_order(encoding))
    first = Stretch(file, base_name(str(file)), mark, count, (), encoding)
    if kind in (".jsonl", ".ndjson"):
        return _text_stretches(first)
    header = _header(first)
    return _text_stretches(
        Stretch(file, first.name, header.end, count, _column_names(file, header), encoding, header.line)
    )


def columns(file: Path | str, encoding: str) -> list[str]:
    """The names of a table's columns; in JSON lines, those of the first readable rows. Raises ValueError."""
    if _kind(file) in _BINARY:
        return list(_no_duplicates(file, _schema(file).names))
    first = next(stretches(file, _LOOKED_AT, encoding), None)
    if first is None:
        raise ValueError(f"--table {file}: it has no rows")
    if first.columns:
        return list(first.columns)
    found: dict[str, None] = {}
    bad = BadRow(1, "empty")
    for row in first.rows():
        if isinstance(row, BadRow):
            bad = row
        else:
            found.update(dict.fromkeys(row))
    if not found:
        raise ValueError(
            f"--table {file}: none of its first {first.count} rows can be read; line {bad.line}: {bad.reason}"
        )
    return list(found)


def _kind(file: Path | str) -> str:
    kind = Path(base_name(str(file))).suffix.lower()
    if kind not in KINDS:
        raise ValueError(f"--table {file}: it is not a .csv, .tsv, .jsonl or .parquet file")
    return kind


def _with_order(encoding: str) -> str:
    """The encoding with a byte order: UTF-16 and UTF-32 without a mark are read as little-endian."""
    name = encoding.lower().replace("_", "-")
    return f"{name}-le" if name in ("utf-16", "utf-32") else encoding


def _header(first: Stretch) -> _Read:
    """The first row of a CSV that is not blank, with its names as keys. Raises ValueError."""
    with Path(first.file).open("rb") as opened:
        opened.seek(int(first.start))  # type: ignore[arg-type]
        for read in _csv_rows(opened, first):
            if isinstance(read.row, BadRow):
                raise ValueError(
                    f"--table {first.file}: line {read.row.line}, which names the columns: {read.row.reason}"
                )
            return read
    raise ValueError(f"--table {first.file}: its first line must name the columns")


def _column_names(file: Path | str, header: _Read) -> tuple[str, ...]:
    assert not isinstance(header.row, BadRow)
    names = tuple(str(name).strip() for name in header.row.values())
    if not any(names):
        raise ValueError(f"--table {file}: its first line must name the columns")
    if any("\udc80" <= c <= "\udcff" for name in names for c in name):
        raise ValueError(
            f"--table {file}: the names of its columns are in a different encoding; give it with --encoding"
        )
    return _no_duplicates(file, names)


def _no_duplicates(file: Path | str, names: Sequence[str]) -> tuple[str, ...]:
    twice = sorted({name for name in names if names.count(name) > 1 and name})
    if twice:
        raise ValueError(f"--table {file}: two columns are named {twice[0]!r}; rename one of them")
    return tuple(names)


def _text_stretches(first: Stretch) -> Iterator[Stretch]:
    assert isinstance(first.start, int)
    start, line, seen, end = first.start, first.line, 0, first.start

    def stretch() -> Stretch:
        return Stretch(first.file, first.name, start, seen, first.columns, first.encoding, line, end)

    with Path(first.file).open("rb") as opened:
        opened.seek(first.start)
        for read in _text_rows(opened, first):
            seen, end = seen + 1, read.end
            if seen == first.count:
                yield stretch()
                start, line, seen = read.end, read.line, 0
        if seen:
            yield stretch()


def _text_rows(file: BinaryIO, table: Stretch) -> Iterator[_Read]:
    """Yield the rows from the current position of a file; blank lines are skipped."""
    return _csv_rows(file, table) if table.columns else _json_rows(file, table)


def _lines(file: BinaryIO, table: Stretch) -> Iterator[_Line]:
    """Yield lines from the current position of a file; they end at "\\n", "\\r\\n" or "\\r"."""
    feed, turn = "\n".encode(table.encoding), "\r".encode(table.encoding)
    ends = re.compile(b"|".join(map(re.escape, (turn + feed, feed, turn))))
    width, at, number, rest = len(feed), file.tell(), table.line, b""
    while chunk := file.read(_CHUNK):
        rest, start = rest + chunk, 0
        for found in ends.finditer(rest):
            if found.start() % width or found.start() < start:  # parts of two other characters
                continue
            if found.end() == len(rest):
                break  # a line feed may follow
            yield _Line(rest[start : found.start()], at + found.end(), number)
            start, number = found.end(), number + 1
        at, rest = at + start, rest[start:]
        if len(rest) > LONGEST_LINE:
            yield _Line(rest, at + len(rest), number)
            at, rest = at + len(rest), b""
    if rest:
        last = ends.search(rest, max(0, len(rest) - len(turn + feed)))
        yield _Line(rest[: last.start()] if last and last.end() == len(rest) else rest, at + len(rest), number)


def _decoded(line: _Line, encoding: str) -> str:
    """Decode a line. Bytes that are not in the encoding become surrogates or, in wide encodings, U+FFFD."""
    try:
        return line.content.decode(encoding)
    except UnicodeDecodeError:
        wide = len("\n".encode(encoding)) > 1
        return line.content.decode(encoding, "replace" if wide else "surrogateescape")


def _csv_rows(file: BinaryIO, table: Stretch) -> Iterator[_Read]:
    """Yield rows of a CSV; before the columns are known, the cells by their number.

    If a quote is wrong, only the line that opened it is lost, and the next row begins on the next line.
    """
    more, waiting = _lines(file, table), deque[_Line]()
    while True:
        taken: list[_Line] = []

        def take(taken: list[_Line] = taken) -> Iterator[str]:
            while line := waiting.popleft() if waiting else next(more, None):
                taken.append(line)
                yield _decoded(line, table.encoding) + "\n"

        try:
            values = next(csv.reader(take(), delimiter=_delimiter(table.file), strict=True), None)
        except csv.Error as error:
            if len(taken) > 1 and ("unexpected end" in str(error) or "field limit" in str(error)):
                raise ValueError(
                    f"--table {table.file}: line {taken[0].number}: a quote is opened and never closed, so that the"
                    " rows after it cannot be separated; close it, or double it if it is part of the text"
                ) from None
            waiting.extendleft(reversed(taken[1:]))
            yield _Read(BadRow(taken[0].number, str(error)), taken[0].end, taken[0].number + 1)
            continue
        if values is None:
            return
        if not values:
            continue  # a blank line
        names = table.columns or tuple(map(str, range(len(values))))
        row: Row | BadRow = BadRow(taken[0].number, f"{len(values)} cells instead of {len(names)}")
        if len(values) == len(names):
            row = dict(zip(names, values, strict=True))
        yield _Read(row, taken[-1].end, taken[-1].number + 1)


def _json_rows(file: BinaryIO, table: Stretch) -> Iterator[_Read]:
    for line in _lines(file, table):
        if not line.content.strip(b" \t\0"):
            continue
        row: Row | BadRow
        try:
            found = json.loads(line.content.decode(table.encoding).removeprefix("\ufeff"), object_pairs_hook=_object)
            row = found if isinstance(found, dict) else BadRow(line.number, "not a JSON object")
        except (ValueError, RecursionError) as error:
            row = BadRow(line.number, str(error).splitlines()[0])
        yield _Read(row, line.end, line.number + 1)


def _object(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def declared_images(file: Path | str) -> list[str]:
    """The columns that a parquet or arrow file of Hugging Face declares as images."""
    about = json.loads((_schema(file).metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {})
    return [name for name, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "Image"]


def _binary_stretches(file: Path | str, count: int) -> Iterator[Stretch]:
    for group, rows in enumerate(_group_sizes(file)):
        for start in range(0, rows, count):
            yield Stretch(file, base_name(str(file)), (group, start), min(count, rows - start))


def _group_sizes(file: Path | str) -> Iterator[int]:
    """Yield the number of rows of each row group of a parquet file, or of each batch of an arrow file."""
    if _kind(file) == ".arrow":
        yield from (batch.num_rows for batch in _arrow_batches(file))
    else:
        about = _parquet(file).metadata
        yield from (about.row_group(group).num_rows for group in range(about.num_row_groups))


def _binary_rows(
    file: Path | str, group: int, start: int, count: int, columns: list[str] | None = None
) -> Iterator[Row]:
    import pyarrow

    try:
        if _kind(file) == ".arrow":
            chosen = itertools.islice(_arrow_batches(file), group, group + 1)
            batches: Any = (batch.select(columns) for batch in chosen) if columns else chosen
        else:
            batches = _parquet(file).iter_batches(batch_size=count, row_groups=[group], columns=columns)
        for batch in batches:
            skipped = min(start, batch.num_rows)
            wanted = batch.slice(skipped, count)  # before rows become Python objects, which takes the most time
            start, count = start - skipped, count - wanted.num_rows
            yield from wanted.to_pylist()
            if not count:
                return
    except pyarrow.ArrowException as error:
        raise OSError(f"{file}: {error}") from None


def _schema(file: Path | str) -> Any:
    return _arrow(file).schema if _kind(file) == ".arrow" else _parquet(file).schema_arrow


def _arrow_batches(file: Path | str) -> Iterator[Any]:
    """Yield the batches of an arrow file, which is mapped and not read; a stream can only be read in order."""
    reader = _arrow(file)
    if hasattr(reader, "num_record_batches"):
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(reader)


def _arrow(file: Path | str) -> Any:
    import pyarrow
    import pyarrow.ipc

    try:
        try:
            return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(pyarrow.memory_map(str(file)))
    except pyarrow.ArrowException as error:
        raise ValueError(f"--table {file}: it is not a readable arrow file: {error}") from None


def _parquet(file: Path | str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        if is_url(str(file)):
            system, path = file_system(str(file))
            return pyarrow.parquet.ParquetFile(system.open(path, "rb"))
        return pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise ValueError(f"--table {file}: it is not a readable parquet file: {error}") from None


def _is_text(schema: Any, column: str) -> bool:
    import pyarrow

    kind = schema.field(column).type
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _delimiter(file: Path | str) -> str:
    return "\t" if str(file).lower().endswith(".tsv") else ","
