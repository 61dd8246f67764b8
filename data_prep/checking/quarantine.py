"""The list of samples that training leaves out: ``quarantine.jsonl`` of a data set.

Each line is {"shard": name, "key": a sample's or null for all of the shard, "reason": text}.
"""

import json
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from dico_t2i.data.errors import DataError
from dico_t2i.data.quarantine import FILE
from dico_t2i.files import flush, temporary

DUPLICATE = "duplicate of "  # how the reasons of data_prep/duplicates.py begin; the others are of verify.py


class Entry(NamedTuple):
    """A sample, or without a key a shard, that is not to be used."""

    shard: str
    key: str | None
    reason: str


def read(root: Path) -> Iterator[Entry]:
    """The entries of a data set's list; none if it has no list. Raises DataError."""
    file = root / FILE
    if not file.exists():
        return
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                content = json.loads(line)
                yield Entry(content["shard"], content["key"], content["reason"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{file}: line {number} is no entry ({error!r}); delete the file and verify") from None


def replace(root: Path, entries: Iterable[Entry], duplicates: bool) -> int:
    """Write new entries in the place of those of the same origin, and return how many the list has.

    duplicates: whether they are duplicates. The file is replaced at once, and removed when nothing is left.
    """
    kept = (entry for entry in read(root) if entry.reason.startswith(DUPLICATE) != duplicates)
    return _write(root, chain(kept, entries))


def forget(root: Path, shards: Collection[str]) -> None:
    """Remove the entries of shards that were made anew."""
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
