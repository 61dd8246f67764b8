"""What every command has in common: exit codes, types of options, errors in one line. Imports nothing heavy."""

import argparse
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

USER_ERROR = 2  # something that only the user can correct; argparse ends with it as well
HANG_EXIT_CODE = 74  # EX_IOERR of sysexits.h: a rank hangs or has died
REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal, saved, try again later
INTERRUPTED = 130  # by Ctrl-C: 128 and the number of SIGINT, as shells have it


def run(main: Callable[[], int], command: str = "") -> int:
    """The exit code of ``main``. Bad input, a ValueError or OSError, becomes one line on stderr; so does Ctrl-C.

    command: what stands before the message, such as "dico train"; without it the word "error".
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
    """A parser whose --help shows the script's docstring as it is written."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


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
    """K/N: this process makes every N-th shard, beginning with shard K, which counts from 0."""
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise ArgumentTypeError(f"{text!r} is not K/N with K from 0 to N - 1")
    return int(number), int(parts)


def progress_bar() -> "Progress":
    """A rich progress bar with counts and the time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "left")
