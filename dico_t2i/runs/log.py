"""Reading the logs of a run, metrics.jsonl and failures.jsonl: one JSON object in each line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def json_lines(path: Path, on_unreadable: Callable[[], None] | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, in order; none if the file is not there.

    A line that holds no object, such as one being written, is passed over, and ``on_unreadable`` is called for it.
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
    """The newest report of metrics.jsonl up to a step; empty without one."""
    last: dict[str, Any] = {}
    for line in reports(path):
        if line.get("step", step + 1) <= step:
            last = line
    return last
