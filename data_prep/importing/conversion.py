"""From a source to image shards: read, filter, crop or keep, write; one process for each shard in work.

A source yields units, each of which becomes one shard, in a process of its own, so that no image passes between
processes and the bytes of a shard depend on its unit and the settings alone. A shard is finished or absent: a run
that was stopped goes on with the missing ones, and several runs share the work with --part.
"""

import argparse
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from PIL import Image

from data_prep.common import claim, in_parallel, remove_leftovers
from data_prep.importing.captions import clean
from data_prep.importing.filters import Dropped, Filters, add_filter_options, filters_of
from data_prep.importing.report import Report, draw_histograms, draw_samples
from dico_t2i.command import part, progress_bar
from dico_t2i.data.decode import MAX_PIXELS, decode_image, decode_whole, read_header
from dico_t2i.data.errors import DataError, SampleError
from dico_t2i.data.index import write_index
from dico_t2i.data.writer import ShardFile

Crop = Literal["center", "resize", "none"]
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")  # of image files to look for
MAX_FILE = 1 << 28  # bytes of an image file
_STORED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # kept byte for byte with --crop none, under these names
_LOOKED_AT = 64  # pixels
_TOO_LARGE = f"more than {MAX_PIXELS} pixels"

Result = TypeVar("Result")


class Raw(NamedTuple):
    """A sample as its source has it. key: unique in the data set; name: for the report; about: goes along as json."""

    key: str
    image: bytes
    name: str
    captions: Sequence[str] = ()
    label: int | None = None
    about: Mapping[str, Any] = {}


class Unreadable(Exception):  # noqa: N818 a state of the source for now
    """A unit that cannot be read now and may be later; its shard stays absent."""


class Unit(Protocol):
    """What becomes one shard. Its repr says all that it depends on; it is sent to another process."""

    def read(self, scratch: Path) -> Iterator[Raw | Dropped]:
        """The samples, in order, or why one is none. scratch: a temporary file's name. Raises Unreadable."""


class Source(Protocol):
    """A data set to bring in. meta: what it is, for the index."""

    @property
    def meta(self) -> dict[str, Any]: ...

    def units(self) -> Iterator[Unit]:
        """All units, in an order that does not change; cheap, for every part goes through it."""


@dataclass(frozen=True)
class Options:
    """What is made of a sample. size: pixels of the square; crop "none" keeps images as they are."""

    size: int = 256
    crop: Crop = "center"
    quality: int = 95
    filters: Filters = field(default_factory=Filters)

    def describe(self) -> dict[str, Any]:
        form = {"crop": "none"} if self.crop == "none" else {n: getattr(self, n) for n in ("size", "crop", "quality")}
        filters = self.filters.describe()
        return {**form, "filters": filters} if filters else form


def add_options(parser: argparse.ArgumentParser, samples_per_shard: bool = True) -> None:
    """The options that all sources share."""
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of shards to make or go on with")
    add("--size", type=int, default=256, help="pixels of the stored square (default: 256)")
    add("--crop", choices=("center", "resize", "none"), help="none: images as they are (default: %(default)s)")
    add("--quality", type=int, default=95, help="of the stored JPEG, 1 to 100 (default: 95)")
    if samples_per_shard:
        add("--samples-per-shard", type=int, default=1000, metavar="N", help="before filters (default: 1000)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one for each CPU core)")
    add("--part", type=part, default=(0, 1), metavar="K/N", help="every N-th shard from K on (default: 0/1)")
    parser.set_defaults(crop="center")
    add_filter_options(parser)


def options_of(args: argparse.Namespace) -> Options:
    """The options of a command line. Raises ValueError."""
    if min(args.size, args.workers, getattr(args, "samples_per_shard", 1)) < 1 or not 1 <= args.quality <= 100:
        raise ValueError("--size, --samples-per-shard, --workers: at least 1; --quality: 1 to 100")
    return Options(args.size, args.crop, args.quality, filters_of(args))


def read_image_file(path: Path, name: str) -> bytes:
    """Content of a regular file of no more than MAX_FILE bytes. Raises Dropped."""
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
            raise Dropped("not image files", name)
        return path.read_bytes()
    except FileNotFoundError:
        raise Dropped("missing image files", name) from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise Dropped("unreadable image files", f"{name}: {error}") from None


def make_sample(raw: Raw, options: Options, report: Report) -> dict[str, Any]:
    """The shard's sample. Raises Dropped."""
    filters, lost = options.filters, report.counts.total()
    width, height, form = _readable(read_header, raw, raw.image)
    captions = filters.captions(raw.captions, report.count)
    report.measure(width, height, [clean(text) for text in raw.captions], kept=False)
    filters.check_size(width, height, raw.name)
    filters.check_fields(raw.about, raw.name)
    if not captions and raw.label is None:
        lost = report.counts.total() > lost
        raise Dropped("images without a caption left" if lost else "images without captions", raw.name)
    content, extension = _readable(_content, raw, raw, form, options)
    report.measure(width, height, captions, kept=True)
    report.bytes += len(content)
    about = {**({"captions": captions} if captions else {}), **raw.about}
    about = {**about, "width": width, "height": height}
    # What is no text (a lone surrogate, of a file name or out of JSON) is escaped.
    text = json.dumps(about, ensure_ascii=False).encode("utf-8", "backslashreplace")
    label = {} if raw.label is None else {"cls": raw.label}
    return {"__key__": raw.key, extension: content, "json": text, **label}


def _readable(work: Callable[..., Result], raw: Raw, *arguments: Any) -> Result:
    """What ``work`` makes of an image. Raises Dropped if it cannot be decoded."""
    try:
        return work(*arguments)
    except SampleError as error:
        reason = _TOO_LARGE if str(MAX_PIXELS) in error.reason else "undecodable images"
        raise Dropped(reason, f"{raw.name}: {error.reason}") from None


def _content(raw: Raw, form: str, options: Options) -> tuple[bytes, str]:
    """The stored image and its extension. Raises SampleError if it cannot be decoded.

    With crop "none" it shows what the source does: its own bytes, or a PNG of what the loader would decode.
    """
    buffer = io.BytesIO()
    if options.crop != "none":
        pixels = decode_image(raw.image, options.size, options.crop)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=options.quality)
        return buffer.getvalue(), "jpg"
    if form in _STORED:
        decode_image(raw.image, _LOOKED_AT, "resize")  # to see that it can be
        return raw.image, _STORED[form]
    Image.fromarray(decode_whole(raw.image)).save(buffer, "PNG")
    return buffer.getvalue(), "png"


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def convert(number: int, unit: Unit, out: Path, options: Options) -> Report | str:
    """Write the shard of a unit and its report; or say why the unit cannot be read now."""
    name, report = shard_name(number), Report()
    file = ShardFile(out / name)
    scratch = out / f".{name}.source.part"
    try:
        for item in unit.read(scratch):
            _add(file, item, options, report)
        report.save(_report_path(out, number), {"unit": fingerprint(unit)})
        file.commit()
    except Unreadable as error:
        file.discard()
        return str(error)
    except BaseException:
        file.discard()
        raise
    finally:
        scratch.unlink(missing_ok=True)
    return report


def _add(file: ShardFile, item: Raw | Dropped, options: Options, report: Report) -> None:
    report.seen += 1
    try:
        if isinstance(item, Dropped):
            raise item
        file.write(make_sample(item, options, report))
        report.kept += 1
    except Dropped as dropped:
        report.count(dropped.reason, dropped.what)
    except DataError:
        report.count("unusable keys", repr(getattr(item, "key", "")))


def fingerprint(unit: Unit) -> str:
    """Changes with what a unit reads, but not with where the source lies."""
    return hashlib.sha256(repr(unit).encode("utf-8", "backslashreplace")).hexdigest()[:16]


def run_pipeline(source: Source, args: argparse.Namespace, noted: Iterable[Dropped] = ()) -> int:
    """Make the missing shards of this part; then, if no shard of any part is missing, the index and the report.

    noted: what was left out before there were units. Returns the exit status. Raises ValueError if the folder is
    of something else or nothing is left.
    """
    options, out = options_of(args), args.out
    meta = {**source.meta, **options.describe()}
    claim(out, meta)
    (out / "reports").mkdir(exist_ok=True)
    total = sum(1 for _ in source.units())
    names = {entry.name for entry in os.scandir(out) if entry.name.endswith(".tar")}
    if (out / "index.json").exists() and all(shard_name(n) in names for n in range(total)):
        print(f"{out}: already holds these images")
        return 0
    absent = {shard_name(n) for n in range(args.part[0], total, args.part[1])} - names
    remove_leftovers(out, absent)
    work = partial(convert, out=out, options=options)
    with progress_bar() as progress:
        results = in_parallel(work, _missing(source, out, args.part, absent), args.workers)
        tracked = progress.track(results, total=len(absent), description="shards")
        unread = [result for result in tracked if isinstance(result, str)]
    for reason in unread[:10]:
        print(f"not read: {reason}")
    if unread:
        print(f"{out}: {len(unread)} shards could not be made now; the same command makes them later")
        return 1
    return _finish(out, total, meta, noted)


def _missing(source: Source, out: Path, part: tuple[int, int], absent: set[str]) -> Iterator[tuple[int, Unit]]:
    for number, unit in enumerate(source.units()):
        if number % part[1] != part[0]:
            continue
        if shard_name(number) in absent:
            yield number, unit
        elif Report.load(_report_path(out, number))[1].get("unit") != fingerprint(unit):
            raise ValueError(f"{out / shard_name(number)}: the source has changed since; choose another --out")


def _report_path(out: Path, number: int) -> Path:
    return out / "reports" / f"{number:06d}.json"


def _finish(out: Path, total: int, meta: dict[str, Any], noted: Iterable[Dropped]) -> int:
    missing = sum(not (out / shard_name(number)).exists() for number in range(total))
    if missing:
        print(f"{out}: {missing} of {total} shards are left to other parts")
        return 0
    report = Report()
    for dropped in noted:
        report.count(dropped.reason, dropped.what)
    for number in range(total):
        report.add(Report.load(_report_path(out, number))[0])
    if not report.kept:
        raise ValueError(f"{out}: no image is left of {report.seen}; {'; '.join(report.lines()[:3])}")
    report.save(out / "report.json", {})
    draw_histograms(report, out / "report.png")
    index = write_index(out, "images", meta)
    draw_samples(index, out / "samples.png")
    print(f"{out}: {report.kept} of {report.seen} samples in {total} shards, {report.bytes / 1e6:.1f} MB of images")
    for line in report.lines():
        print(f"  {line}")
    return 0
