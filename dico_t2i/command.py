"""The common parts of all commands: exit codes, types of options, one-line errors. Nothing slow is imported."""

import argparse
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

USER_ERROR = 2  # an error that only the user can correct; argparse uses the same code
HANG_EXIT_CODE = 74  # EX_IOERR of sysexits.h: a rank hangs or has died
REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal after saving; start again later
INTERRUPTED = 130  # by Ctrl-C: 128 plus the number of SIGINT, as in shells


def run(main: Callable[[], int], command: str = "") -> int:
    """Run ``main`` and return its exit code. Bad input (ValueError, OSError) or Ctrl-C becomes one line on stderr.

    command: the prefix of the message, such as "dico train"; "error" if it is empty.
    """
    try:
        return main()
    except (ValueError, OSError) as error:  # ConfigError, DataError, a missing file
        print(f"{command or 'error'}: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{command}: interrupted" if command else "interrupted", file=sys.stderr)
        return INTERRUPTED


def script_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help shows the script's docstring unchanged."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def place(text: str) -> Path | str:
    """A path, or a URL as it is."""
    return text if "://" in text else Path(text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(1, text)


def non_negative(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < least:
        raise ArgumentTypeError(f"must be at least {least}, not {number}")
    return number


def part(text: str) -> tuple[int, int]:
    """K/N: this process makes every N-th shard, starting at shard K, counted from 0."""
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise ArgumentTypeError(f"{text!r} is not K/N with K from 0 to N - 1")
    return int(number), int(parts)


def shows_bars(console: "Console") -> bool:
    """Whether a console can show a progress bar: a terminal, or a notebook that has ipywidgets."""
    return console.file.isatty() or (console.is_jupyter and find_spec("ipywidgets") is not None)


def progress_bar() -> "Progress":
    """A rich progress bar with counts and the time left; in a notebook only if it can show one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "left")
    return Progress(*columns, console=console, disable=console.is_jupyter and not shows_bars(console))
