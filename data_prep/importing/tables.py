"""Rows of CSV, JSON lines and parquet files, in stretches that can be read on their own.

A table is gone through once, without keeping its rows; where each stretch begins is all that stays in memory.
"""

import csv
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

LONGEST_LINE = 1 << 24  # bytes; what lies behind is another line, which will not parse

Row = dict[str, Any]


@dataclass(frozen=True)
class Stretch:
    """So many rows of a table. start: byte of a text, or (row group, row in it) of a parquet file."""

    file: Path = field(repr=False)
    name: str
    start: int | tuple[int, int]
    count: int
    columns: tuple[str, ...] = ()  # of a CSV
    encoding: str = "utf-8"

    def rows(self) -> Iterator[Row | None]:
        """The rows; None for one that cannot be parsed."""
        if isinstance(self.start, tuple):
            yield from _parquet_rows(self.file, *self.start, self.count)
            return
        with self.file.open("rb") as file:
            file.seek(self.start)
            rows = _json_rows(file, self.encoding) if not self.columns else _csv_rows(file, self)
            yield from (row for _, row in itertools.islice(rows, self.count))


def stretches(file: Path, count: int, encoding: str) -> Iterator[Stretch]:
    """A table in stretches of ``count`` rows. Raises ValueError if it is not of a known kind or has no rows."""
    kind = file.suffix.lower()
    if kind == ".parquet":
        return _parquet_stretches(file, count)
    if kind in (".jsonl", ".ndjson"):
        return _text_stretches(file, Stretch(file, file.name, 0, count, (), encoding))
    if kind in (".csv", ".tsv"):
        with file.open("rb") as opened:
            header = opened.readline(LONGEST_LINE)
        columns = next(csv.reader([header.decode("utf-8-sig", "replace")], delimiter=_delimiter(file)), [])
        if not columns:
            raise ValueError(f"--table {file}: its first line must name the columns")
        return _text_stretches(file, Stretch(file, file.name, len(header), count, tuple(columns), encoding))
    raise ValueError(f"--table {file}: not a .csv, .tsv, .jsonl or .parquet file")


def columns(file: Path, encoding: str) -> list[str]:
    """Names of a table's columns; of JSON lines, of the first one. Raises ValueError."""
    if file.suffix.lower() == ".parquet":
        return list(_parquet(file).schema_arrow.names)
    first = next(stretches(file, 1, encoding), None)
    row = None if first is None else next(first.rows(), None)
    if row is None:
        raise ValueError(f"--table {file}: its first row cannot be read")
    return list(row)


def _text_stretches(file: Path, first: Stretch) -> Iterator[Stretch]:
    assert isinstance(first.start, int)
    with file.open("rb") as opened:
        opened.seek(first.start)
        start, seen = first.start, 0
        for end, _ in _csv_rows(opened, first) if first.columns else _json_rows(opened, first.encoding):
            seen += 1
            if seen == first.count:
                yield Stretch(file, first.name, start, seen, first.columns, first.encoding)
                start, seen = end, 0
        if seen:
            yield Stretch(file, first.name, start, seen, first.columns, first.encoding)


def _csv_rows(file: BinaryIO, table: Stretch) -> Iterator[tuple[int, Row | None]]:
    """Rows, each with the byte behind it; what is not in the encoding stays as surrogates."""
    end = file.tell()

    def lines() -> Iterator[str]:
        nonlocal end
        while line := file.readline(LONGEST_LINE):
            end += len(line)
            yield line.decode(table.encoding, "surrogateescape")

    reader = csv.reader(lines(), delimiter=_delimiter(table.file))
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error:
            values = []
        whole = len(values) == len(table.columns)
        yield end, dict(zip(table.columns, values, strict=True)) if whole else None


def _json_rows(file: BinaryIO, encoding: str) -> Iterator[tuple[int, Row | None]]:
    end = file.tell()
    while line := file.readline(LONGEST_LINE):
        end += len(line)
        try:
            row = json.loads(line.decode(encoding).removeprefix("\ufeff"))
        except (ValueError, RecursionError):
            row = None
        yield end, row if isinstance(row, dict) else None


def _parquet_stretches(file: Path, count: int) -> Iterator[Stretch]:
    about = _parquet(file).metadata
    for group in range(about.num_row_groups):
        rows = about.row_group(group).num_rows
        for start in range(0, rows, count):
            yield Stretch(file, file.name, (group, start), min(count, rows - start))


def _parquet_rows(file: Path, group: int, start: int, count: int) -> Iterator[Row | None]:
    import pyarrow

    try:
        for batch in _parquet(file).iter_batches(batch_size=count, row_groups=[group]):
            skipped = min(start, batch.num_rows)
            wanted = batch.slice(skipped, count)  # before rows become Python's, which is what takes time
            start, count = start - skipped, count - wanted.num_rows
            yield from wanted.to_pylist()
            if not count:
                return
    except pyarrow.ArrowException as error:
        raise OSError(f"{file}: {error}") from None


def _parquet(file: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise ValueError(f"--table {file}: not a readable parquet file: {error}") from None


def _delimiter(file: Path) -> str:
    return "\t" if file.suffix.lower() == ".tsv" else ","
