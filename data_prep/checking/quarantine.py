"""Reads and writes ``quarantine.jsonl`` of a data set, the list of samples that training skips.

Each line is {"shard": name, "key": a sample's key or null for the whole shard, "reason": text}.
"""

import json
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from dico_t2i.data.errors import DataError
from dico_t2i.data.quarantine import FILE
from dico_t2i.files import flush, temporary

DUPLICATE = "duplicate of "  # the reasons of data_prep/duplicates.py begin with this; all others are from verify.py


class Entry(NamedTuple):
    """A sample that must not be used, or a whole shard if it has no key."""

    shard: str
    key: str | None
    reason: str


def read(root: Path) -> Iterator[Entry]:
    """Yield the entries of a data set's list, if there is one. Raises DataError."""
    file = root / FILE
    if not file.exists():
        return
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                content = json.loads(line)
                yield Entry(content["shard"], content["key"], content["reason"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{file}: line {number} is not an entry ({error!r}); delete the file and run verify.py"
                ) from None


def replace(root: Path, entries: Iterable[Entry], duplicates: bool) -> int:
    """Replace the entries of the same origin by new ones, and return the number of entries in the list.

    duplicates: whether the new entries are duplicates. The file is replaced atomically, and deleted if the list is
    empty.
    """
    kept = (entry for entry in read(root) if entry.reason.startswith(DUPLICATE) != duplicates)
    return _write(root, chain(kept, entries))


def forget(root: Path, shards: Collection[str]) -> None:
    """Remove the entries of shards that were made again."""
    if (root / FILE).exists():
        _write(root, (entry for entry in read(root) if entry.shard not in shards))


def _write(root: Path, listed: Iterator[Entry]) -> int:
    file, part, count = root / FILE, temporary(root / FILE), 0
    first = next(listed, None)
    if first is None:
        file.unlink(missing_ok=True)
        return 0
    with part.open("w", encoding="utf-8") as lines:
        for count, entry in enumerate(chain([first], listed), 1):  # noqa: B007
            lines.write(json.dumps(entry._asdict()) + "\n")
    flush(part)
    part.replace(file)
    return count
