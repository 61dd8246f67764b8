"""What the data preparation scripts share: one-line errors, folders that are finished or absent, progress."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def run(main: Callable[[], int]) -> int:
    """Exit status of a script: bad input (ValueError, OSError) becomes one line on stderr and status 2."""
    try:
        return main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def is_finished(out: Path, meta: dict[str, Any]) -> bool:
    """Whether ``out`` already holds the data set that ``meta`` describes; False if it is absent or empty.

    Raises ValueError if it holds anything else: nothing is overwritten.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    index = out / "index.json"
    found = json.loads(index.read_text(encoding="utf-8"))["meta"] if index.is_file() else None
    if found == json.loads(json.dumps(meta)):
        return True
    what = f"a data set with other settings: {found}" if found else "other files"
    raise ValueError(f"--out {out}: holds {what}; remove it or choose another folder")


@contextmanager
def finished_or_absent(out: Path) -> Iterator[Path]:
    """A folder to write to that becomes ``out`` when the block ends without an error.

    It is ``<out>.partial``; what an interrupted run left there is removed first.
    """
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(out)


def progress_bar() -> Progress:
    """A rich progress bar with counts and the time left."""
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "left")
