"""Reads and writes the logs of a run, metrics.jsonl and failures.jsonl, which have one JSON object in each line."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


class LogWriter:
    """Appends JSON lines to a file without buffering; an incomplete line left by a crash is ended first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab+", buffering=0)
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(0, size - 1))
        self._torn = self._file.read(1) not in (b"", b"\n")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line. Raises OSError if it cannot be written."""
        content = (b"\n" if self._torn else b"") + json.dumps(line).encode() + b"\n"
        start = self._file.seek(0, os.SEEK_END)
        written = self._file.write(content)
        if written != len(content):
            self._file.truncate(start)
            raise OSError(f"only {written} of {len(content)} bytes were written")
        self._torn = False

    def close(self) -> None:
        self._file.close()


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Append one line. Raises OSError if it cannot be written."""
    writer = LogWriter(path)
    try:
        writer.write(line)
    finally:
        writer.close()


def json_lines(path: Path, on_unreadable: Callable[[], None] | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, in order; none if the file does not exist.

    A line that is not an object, such as one that is being written, is skipped, and ``on_unreadable`` is called.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if isinstance(line, dict):
                yield line
            elif on_unreadable:
                on_unreadable()


def reports(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl that report training losses."""
    return (line for line in json_lines(path) if "loss" in line)


def last_report(path: Path, step: int) -> dict[str, Any]:
    """The newest report of metrics.jsonl up to a step; empty if there is none."""
    last: dict[str, Any] = {}
    for line in reports(path):
        if line.get("step", step + 1) <= step:
            last = line
    return last
