"""Decides which images and captions are kept. Each reason to skip one has a name, under which the report counts it."""

import argparse
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from data_prep.importing.captions import clean, oddity
from dico_t2i.data.decode import MAX_PIXELS

Value = TypeVar("Value")


class Dropped(Exception):  # noqa: N818 it is not an error: a source may yield it instead of a sample
    """Something that is skipped. reason: the name under which it is counted; what: its own name, as an example.

    part: whether it is only part of a sample, such as a caption; the reason then begins with "captions" or "members".
    """

    def __init__(self, reason: str, what: str, part: bool = False) -> None:
        super().__init__(reason, what, part)
        self.reason, self.what, self.part = reason, what, part


@dataclass(frozen=True)
class Filters:
    """Limits, in pixels and characters; aspect is the longer side divided by the shorter side.

    min_field, max_field: limits of a sample's numeric fields. drop_value: text of a field that excludes the sample.
    hold_out: a field, and the share of its values that are held out; hold_out_one_of: a second field, and the values of
    which only one, drawn for each value of the first, is held out. held_out: keep these samples and no others.
    """

    min_side: int = 1
    max_pixels: int = MAX_PIXELS
    max_aspect: float = math.inf
    min_caption: int = 1
    max_caption: int = 10_000
    odd_captions: bool = False
    min_field: tuple[tuple[str, float], ...] = ()
    max_field: tuple[tuple[str, float], ...] = ()
    drop_value: tuple[tuple[str, str], ...] = ()
    hold_out: tuple[str, float] | None = None
    hold_out_one_of: tuple[str, str] | None = None
    held_out: bool = False

    def describe(self) -> dict[str, Any]:
        """The values that differ from the defaults."""
        return {name: value for name, value in asdict(self).items() if value != getattr(Filters, name)}

    def check_size(self, width: int, height: int, what: str) -> None:
        """Raise Dropped for an image outside the limits."""
        short, long = sorted((width, height))
        if width * height > self.max_pixels:
            raise Dropped(f"more than {self.max_pixels} pixels", f"{what} ({width}x{height})")
        if short < self.min_side:
            raise Dropped(f"smaller side below {self.min_side}", f"{what} ({width}x{height})")
        if long > self.max_aspect * short:
            raise Dropped(f"aspect ratio above {self.max_aspect:g}", f"{what} ({width}x{height})")

    def check_fields(self, about: Mapping[str, Any], what: str) -> None:
        """Raise Dropped for fields outside the limits, and for such fields that are missing or not numbers."""
        for name, low in self.min_field:
            if _number(about, name, what) < low:
                raise Dropped(f"{name} below {low:g}", what)
        for name, high in self.max_field:
            if _number(about, name, what) > high:
                raise Dropped(f"{name} above {high:g}", what)
        for name, unwanted in self.drop_value:
            if about.get(name) is None:
                raise Dropped(f"{name} missing", what)
            if str(about[name]).casefold() == unwanted.casefold():
                raise Dropped(f"{name} is {unwanted}", what)

    def check_held_out(self, about: Mapping[str, Any], what: str) -> None:
        """Raise Dropped for samples that are held out, or with ``held_out`` for all others."""
        if self.hold_out is None:
            return
        name, share = self.hold_out
        if about.get(name) is None:
            raise Dropped(f"{name} missing", what)
        held = _drawn(name, about[name]) < share
        if held and self.hold_out_one_of:
            other, text = self.hold_out_one_of
            values = text.split(",")
            held = str(about.get(other)) == values[int(_drawn(other, about[name]) * len(values))]
        if held != self.held_out:
            raise Dropped("held out" if held else "not held out", what)

    def captions(self, captions: Sequence[str], count: Callable[[str, str], None]) -> list[str]:
        """The captions that are kept, cleaned; ``count`` is called for the others."""
        kept = []
        for caption in captions:
            text = clean(caption)
            reason = None if self.odd_captions and text else oddity(text)
            if reason is None and not self.min_caption <= len(text) <= self.max_caption:
                reason = f"not of {self.min_caption} to {self.max_caption} characters"
            if reason:
                count(f"captions {reason}", text[:60])
            else:
                kept.append(text)
        return kept


def add_filter_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("filters")
    add = group.add_argument
    add("--min-side", type=int, default=1, metavar="PX", help="least length of an image's shorter side (default: 1)")
    add(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help=f"most pixels, width times height (default: {MAX_PIXELS})",
    )
    add(
        "--max-aspect",
        type=float,
        default=math.inf,
        metavar="R",
        help="largest ratio of longer to shorter side (default: any)",
    )
    add("--min-caption", type=int, default=1, metavar="N", help="fewest characters of a caption (default: 1)")
    add("--max-caption", type=int, default=10_000, metavar="N", help="most characters of a caption (default: 10000)")
    add(
        "--odd-captions",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep captions that are only punctuation, a URL or a file name, or repeat a character",
    )
    numbers, texts = _pair(float), _pair(str)
    add(
        "--min-field",
        type=numbers,
        nargs="+",
        default=[],
        metavar="NAME=X",
        help="least values of fields, such as aesthetic=5.0",
    )
    add(
        "--max-field",
        type=numbers,
        nargs="+",
        default=[],
        metavar="NAME=X",
        help="largest values of fields, such as pwatermark=0.8",
    )
    add(
        "--drop-value",
        type=texts,
        nargs="+",
        default=[],
        metavar="NAME=TEXT",
        help="skip samples with these values, such as NSFW=NSFW NSFW=UNSURE",
    )
    share, choice = _pair(float), _pair(str)
    add("--hold-out", type=share, metavar="NAME=X", help="leave out a share of a field's values, such as code=0.1")
    add(
        "--hold-out-one-of",
        type=choice,
        metavar="NAME=A,B",
        help="of each such value, only leave out the samples with one of these, such as style=flat,3d",
    )
    add("--held-out", action="store_true", help="keep what --hold-out leaves out, and nothing else")


def filters_of(args: argparse.Namespace) -> Filters:
    """The filters of a command line. Raises ValueError for limits that would keep nothing."""
    if min(args.min_side, args.max_pixels, args.min_caption) < 1 or args.max_aspect < 1:
        raise ValueError("--min-side, --max-pixels, --min-caption, --max-aspect: at least 1")
    if args.max_caption < args.min_caption:
        raise ValueError(f"--max-caption {args.max_caption}: below --min-caption {args.min_caption}")
    if args.max_pixels > MAX_PIXELS:
        raise ValueError(f"--max-pixels {args.max_pixels}: training reads no more than {MAX_PIXELS}")
    if (args.hold_out_one_of or args.held_out) and not args.hold_out:
        raise ValueError("--hold-out-one-of, --held-out: they need --hold-out")
    if args.hold_out and not 0 < args.hold_out[1] <= 1:
        raise ValueError(f"--hold-out {args.hold_out[0]}={args.hold_out[1]:g}: the share must be above 0 and at most 1")
    given: dict[str, Any] = {limit.name: getattr(args, limit.name) for limit in fields(Filters)}
    for name in ("min_field", "max_field", "drop_value"):
        given[name] = tuple(given[name])
    return Filters(**given)


def _drawn(purpose: str, value: object) -> float:
    """A number in 0..1 that depends on these two alone."""
    digest = hashlib.sha256(f"held out {purpose} {value}".encode("utf-8", "backslashreplace")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _number(about: Mapping[str, Any], name: str, what: str) -> float:
    try:
        value = float(about[name])
    except (KeyError, TypeError, ValueError, OverflowError):
        value = math.nan
    if math.isnan(value):
        raise Dropped(f"{name} missing", what)
    return value


def _pair(convert: Callable[[str], Value]) -> Callable[[str], tuple[str, Value]]:
    def parse(text: str) -> tuple[str, Value]:
        name, equals, value = text.partition("=")
        try:
            if name and equals:
                return name, convert(value)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")

    return parse
