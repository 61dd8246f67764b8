"""Converts a source to image shards: reads, filters, crops or keeps, and writes images, one process for each shard.

A source yields units. Each unit becomes one shard, in its own process, so that no image is passed between processes and
the bytes of a shard depend on its unit and the settings alone. A shard is complete or absent: a run that was stopped
resumes with the missing ones, and several runs share the work with --part.
"""

import argparse
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from stat import S_ISREG
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from PIL import Image

from data_prep.checking import quarantine
from data_prep.checking.hashes import HashFile, equal, key_hash
from data_prep.common import claim, held, in_parallel, remove_leftovers, settings_of
from data_prep.importing.background import add_background_option, on_background
from data_prep.importing.captions import clean
from data_prep.importing.filters import Dropped, Filters, add_filter_options, filters_of
from data_prep.importing.report import Report, draw_histograms, draw_samples
from dico_t2i.command import part, progress_bar
from dico_t2i.data.decode import MAX_PIXELS, decode_image, decode_whole, read_header
from dico_t2i.data.errors import DataError, SampleError
from dico_t2i.data.index import DatasetIndex, write_index
from dico_t2i.data.sample import Caption
from dico_t2i.data.shard import index_path
from dico_t2i.data.tar import key_without_dots
from dico_t2i.data.writer import ShardFile

Crop = Literal["center", "resize", "none"]
MAX_FILE = 1 << 28  # most bytes of an image file
_STORED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # kept byte for byte with --crop none, under these names
_SHARD = re.compile(r"shard-(\d{6,})\.tar")
_LOOKED_AT = 64  # side in pixels to which images are decoded to check them
_LOOKING = 16  # units whose files are checked for changes at the same time
_TOO_LARGE = f"more than {MAX_PIXELS} pixels"

Result = TypeVar("Result")


class Raw(NamedTuple):
    """A sample as its source provides it. key: unique in the data set; name: for the report; about: goes into its json.

    sources: the source of each caption, if there are several. other: what was found instead of captions, in words.
    """

    key: str
    image: bytes
    name: str
    captions: Sequence[str] = ()
    label: int | None = None
    about: Mapping[str, Any] = {}
    sources: Sequence[str] = ()
    other: Sequence[str] = ()


class Unreadable(Exception):  # noqa: N818 it describes the present state of the source
    """Raised for a unit that cannot be read now, but perhaps later; its shard stays absent."""


class Unit(Protocol):
    """The part of a source that becomes one shard, in another process. Its repr must not name the source's place."""

    def state(self) -> str:
        """A text that changes when the files of the unit change: sizes, times, hashes, ETags.

        It is cheap to compute, because nothing is decoded. Raises Unreadable.
        """

    def read(self, scratch: Path) -> Iterator[Raw | Dropped]:
        """Yield each sample in order, or why it is skipped. scratch: name of a temporary file. Raises Unreadable."""


class Source(Protocol):
    """A data set to import. meta: what it is, for the index; contents: the keys of meta that describe its content."""

    contents: ClassVar[tuple[str, ...]]

    @property
    def meta(self) -> dict[str, Any]: ...

    def units(self) -> Iterator[Unit]:
        """All units, always in the same order; cheap to compute, because every part iterates over all of them."""


@dataclass(frozen=True)
class Options:
    """How samples are stored. size: pixels of the square; crop "none" keeps images as they are.

    background: a colour or "random" for transparent images.
    """

    size: int = 256
    crop: Crop = "center"
    quality: int = 95
    background: str | None = None
    filters: Filters = field(default_factory=Filters)

    def describe(self) -> dict[str, Any]:
        form = {"crop": "none"} if self.crop == "none" else {n: getattr(self, n) for n in ("size", "crop", "quality")}
        form |= {"background": self.background} if self.background else {}
        filters = self.filters.describe()
        return {**form, "filters": filters} if filters else form


def add_options(parser: argparse.ArgumentParser, samples_per_shard: bool = True) -> None:
    """Add the options that all sources share."""
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of shards to make or resume")
    add("--size", type=int, default=256, help="pixels of the stored square (default: 256)")
    add("--crop", choices=("center", "resize", "none"), help="none: keep images as they are (default: %(default)s)")
    add("--quality", type=int, default=95, help="quality of the stored JPEG, 1 to 100 (default: 95)")
    if samples_per_shard:
        add("--samples-per-shard", type=int, metavar="N", help="samples before filters (default: 1000, or as before)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one for each CPU core)")
    add("--part", type=part, default=(0, 1), metavar="K/N", help="make every N-th shard, from K on (default: 0/1)")
    add("--redo-changed", action="store_true", help="make shards again whose source has changed (default: an error)")
    add_background_option(parser)
    parser.set_defaults(crop="center")
    add_filter_options(parser)


def options_of(args: argparse.Namespace) -> Options:
    """The options of a command line; a resumed folder keeps its number of samples per shard. Raises ValueError."""
    if getattr(args, "samples_per_shard", 0) is None:
        args.samples_per_shard = settings_of(args.out).get("samples_per_shard", 1000)
    if min(args.size, args.workers, getattr(args, "samples_per_shard", 1)) < 1 or not 1 <= args.quality <= 100:
        raise ValueError("--size, --samples-per-shard, --workers: at least 1; --quality: 1 to 100")
    return Options(args.size, args.crop, args.quality, args.background, filters_of(args))


def read_image_file(path: Path, name: str) -> bytes:
    """The content of a regular file of at most MAX_FILE bytes. Raises Dropped."""
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
            raise Dropped("not image files", name)
        return path.read_bytes()
    except FileNotFoundError:
        raise Dropped("missing image files", name) from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise Dropped("unreadable image files", f"{name}: {error}") from None


def state_of(path: Path) -> str:
    """The size and modification time of a file; "" if it does not exist."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def make_sample(raw: Raw, options: Options, report: Report) -> dict[str, Any]:
    """The sample to write to the shard. Raises Dropped."""
    filters, lost = options.filters, report.counts.total()
    width, height, form = _readable(read_header, raw, raw.image)
    kept = [
        Caption(text, source)
        for caption, source in zip(raw.captions, raw.sources or [""] * len(raw.captions), strict=True)
        for text in filters.captions([caption], report.count)
    ]
    captions = [caption.text for caption in kept]
    report.measure(width, height, [clean(text) for text in raw.captions], kept=False)
    filters.check_size(width, height, raw.name)
    filters.check_fields(raw.about, raw.name)
    filters.check_held_out(raw.about, raw.name)
    if not captions and raw.label is None:
        why = f"{raw.name}: {', '.join(raw.other)} instead" if raw.other else raw.name
        lost = report.counts.total() > lost
        raise Dropped("images without a caption left" if lost else "images without captions", why)
    placed = _readable(on_background, raw, raw.image, options.background, raw.key) if options.background else None
    if placed:
        raw, form = raw._replace(image=placed[0], about={**raw.about, "background": list(placed[1])}), "PNG"
    content, extension = _readable(_content, raw, raw, form, options)
    report.measure(width, height, captions, kept=True)
    report.bytes += len(content)
    for kind in raw.other:
        report.count("captions that are not text", f"{raw.name}: {kind}")
    sources = {"caption_sources": [caption.source for caption in kept]} if any(raw.sources) else {}
    about = {**({"captions": captions, **sources} if captions else {}), **raw.about}
    about = {**about, "width": width, "height": height}
    # Surrogates without a partner (in a file name or in JSON) are not text and are escaped.
    text = json.dumps(about, ensure_ascii=False).encode("utf-8", "backslashreplace")
    label = {} if raw.label is None else {"cls": raw.label}
    return {"__key__": key_without_dots(raw.key), extension: content, "json": text, **label}


def _readable(work: Callable[..., Result], raw: Raw, *arguments: Any) -> Result:
    """The result of ``work``. Raises Dropped if the image cannot be decoded."""
    try:
        return work(*arguments)
    except SampleError as error:
        reason = _TOO_LARGE if str(MAX_PIXELS) in error.reason else "undecodable images"
        raise Dropped(reason, f"{raw.name}: {error.reason}") from None


def _content(raw: Raw, form: str, options: Options) -> tuple[bytes, str]:
    """The stored image and its extension. Raises SampleError if it cannot be decoded.

    With crop "none" the picture stays the same: the image's own bytes, or a PNG of what the loader would decode.
    """
    buffer = io.BytesIO()
    if options.crop != "none":
        pixels = decode_image(raw.image, options.size, options.crop)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=options.quality)
        return buffer.getvalue(), "jpg"
    if form in _STORED:
        decode_image(raw.image, _LOOKED_AT, "resize")  # checks that it can be decoded
        return raw.image, _STORED[form]
    Image.fromarray(decode_whole(raw.image)).save(buffer, "PNG")
    return buffer.getvalue(), "png"


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def convert(number: int, unit: Unit, out: Path, options: Options) -> Report | str:
    """Write the shard of a unit, and its report; returns the report, or why the unit cannot be read now."""
    name, report, content = shard_name(number), Report(), hashlib.sha256()
    file, keys = ShardFile(out / name), set[str]()
    scratch = out / f".{name}.source.part"
    try:
        state = fingerprint(unit)  # before reading, so that changes made meanwhile are noticed
        for item in unit.read(scratch):
            content.update(_digest(item))
            _add(file, item, keys, options, report)
        report.save(_report_path(out, number), {"state": state, "content": content.hexdigest()})
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


def _add(file: ShardFile, item: Raw | Dropped, keys: set[str], options: Options, report: Report) -> None:
    if isinstance(item, Dropped):
        report.note(item)
        return
    report.seen += 1
    try:
        sample = make_sample(item, options, report)
        if sample["__key__"] in keys:
            raise Dropped("keys that an earlier sample has", f"{item.name}: {item.key!r}")
        file.write(sample)
        keys.add(sample["__key__"])
        report.kept += 1
    except Dropped as dropped:
        report.count(dropped.reason, dropped.what)
    except DataError:
        report.count("unusable keys", repr(item.key))


def _digest(item: Raw | Dropped) -> bytes:
    """A hash of everything that a sample is made from."""
    if isinstance(item, Dropped):
        return hashlib.sha256(item.reason.encode()).digest()
    digest = hashlib.sha256(item.image)
    words = repr((item.key, item.captions, item.label, dict(item.about), item.sources, item.other))
    digest.update(words.encode("utf-8", "backslashreplace"))
    return digest.digest()


def fingerprint(unit: Unit) -> str:
    """A text that changes with the content of a unit, but not with its location. Raises Unreadable."""
    words = f"{unit!r}\n{unit.state()}"
    return hashlib.sha256(words.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def run_pipeline(source: Source, args: argparse.Namespace, noted: Iterable[Dropped] = ()) -> int:
    """Make the missing shards of this part, and once the shards of all parts exist, the index and the report.

    noted: what was skipped before there were units. Returns the exit status. Raises ValueError if the folder has a
    different content, the source of existing shards has changed, or no image is left.
    """
    options, out = options_of(args), args.out
    meta, total = {**source.meta, **options.describe()}, sum(1 for _ in source.units())  # before anything is written
    size = {"samples_per_shard": args.samples_per_shard} if "samples_per_shard" in args else {}
    unknown = set(size) - set(settings_of(out))  # older folders do not record it
    claim(out, {**meta, **size}, {*source.contents, *unknown})
    (out / "reports").mkdir(exist_ok=True)
    mine = range(args.part[0], total, args.part[1])
    with held(out, mine):
        names = {entry.name for entry in os.scandir(out) if entry.name.endswith(".tar")}
        absent = {shard_name(number) for number in mine} - names
        absent |= _stale(source, out, args.part, names, args.redo_changed)
        if not absent and (out / "index.json").exists():
            print(f"{out}: it already contains these images")
            return 0
        unread = _make(source, absent, args, options)
    for reason in unread[:10]:
        print(f"could not be read: {reason}")
    if unread:
        print(f"{out}: {len(unread)} shards could not be made; run the same command when they can be read")
        return 1
    return _finish(source, out, total, meta, noted)


def _make(source: Source, absent: set[str], args: argparse.Namespace, options: Options) -> list[str]:
    """Make these shards. Returns the reasons why units could not be read."""
    remove_leftovers(args.out, absent)
    missing = ((n, unit) for n, unit in _own(source, args.part) if shard_name(n) in absent)
    with progress_bar() as progress:
        results = in_parallel(partial(convert, out=args.out, options=options), missing, args.workers)
        tracked = progress.track(results, total=len(absent), description="shards")
        return [result for result in tracked if isinstance(result, str)]


def _own(source: Source, part: tuple[int, int]) -> Iterator[tuple[int, Unit]]:
    """Yield the units of a part, with their numbers."""
    return ((number, unit) for number, unit in enumerate(source.units()) if number % part[1] == part[0])


def _stale(source: Source, out: Path, part: tuple[int, int], names: set[str], redo: bool) -> set[str]:
    """The shards of this part whose source has changed since they were made, so that they must be made again.

    Shards for which the source has no more units are deleted. Raises ValueError in both cases, unless ``redo``.
    """
    own = _own(source, part)
    changed, unknown, total = set[str](), list[str](), 0
    with ThreadPoolExecutor(_LOOKING) as pool:
        while batch := list(islice(own, _LOOKING * 4)):
            total = batch[-1][0] + 1
            there = [item for item in batch if shard_name(item[0]) in names]
            for (number, _), state in zip(
                there, pool.map(lambda item: _state(item[0], item[1], out), there), strict=True
            ):
                unknown += [state] if isinstance(state, str) else []
                changed |= {shard_name(number)} if state is True else set()
    numbers = {int(found[1]): found[0] for name in names if (found := _SHARD.fullmatch(name))}
    surplus = {name for number, name in numbers.items() if number >= total and number % part[1] == part[0]}
    for reason in unknown[:10]:
        print(f"could not check whether the source has changed: {reason}")
    if not changed and not surplus:
        return set()
    first = min(changed | surplus)
    if not redo:
        raise ValueError(
            f"{out}: the source has changed since {len(changed | surplus)} shards were made, such as {first};"
            " make them again with --redo-changed, or choose a different --out"
        )
    print(f"{out}: the source of {len(changed | surplus)} shards has changed, such as {first}; they are made again")
    (out / "index.json").unlink(missing_ok=True)
    quarantine.forget(out, changed | surplus)
    for name in changed | surplus:
        (out / name).unlink()
        index_path(out / name).unlink(missing_ok=True)
    return changed


def _state(number: int, unit: Unit, out: Path) -> bool | str:
    """Whether the source of a shard has changed, or the reason why this cannot be checked.

    If only sizes or times differ, for example after a copy, the content decides.
    """
    made = Report.load(_report_path(out, number))[1]
    if "content" not in made:  # made by a version that did not record it
        return False
    try:
        if fingerprint(unit) == made["state"]:
            return False
        content, scratch = hashlib.sha256(), out / f".{shard_name(number)}.source.part"
        try:
            for item in unit.read(scratch):
                content.update(_digest(item))
        finally:
            scratch.unlink(missing_ok=True)
        return content.hexdigest() != made["content"]
    except Unreadable as error:
        return str(error)


def _report_path(out: Path, number: int) -> Path:
    return out / "reports" / f"{number:06d}.json"


def _finish(source: Source, out: Path, total: int, meta: dict[str, Any], noted: Iterable[Dropped]) -> int:
    missing = sum(not (out / shard_name(number)).exists() for number in range(total))
    if missing:
        print(f"{out}: {missing} of {total} shards remain for other parts")
        return 0
    report, content = Report(), hashlib.sha256()
    for dropped in noted:
        report.note(dropped)
    for number in range(total):
        one, made = Report.load(_report_path(out, number))
        report.add(one)
        content.update(str(made.get("content")).encode())
    if not report.kept:
        raise ValueError(f"{out}: none of {report.seen} images is left; {'; '.join(report.lines()[:3])}")
    index = write_index(out, "images", {**meta, "content": content.hexdigest()}, check=False)
    _check_keys(index)
    report.save(out / "report.json", {})
    draw_histograms(report, out / "report.png")
    draw_samples(index, out / "samples.png")
    print(f"{out}: {report.kept} of {report.seen} samples in {total} shards, {report.bytes / 1e6:.1f} MB of images")
    for line in report.lines():
        print(f"  {line}")
    return 0


def _check_keys(index: DatasetIndex) -> None:
    """Raise ValueError that names both shards if a key is in two of them, and delete the index."""
    hashes = HashFile(index.samples, index.root)
    for number in range(len(index.names)):
        shard = index.shard(number)
        hashes.put(number, np.array([key_hash(shard.key(member)) for member in range(len(shard))], np.uint64))
    for first, later in equal(hashes.values):
        for one, other in zip(first.tolist(), later.tolist(), strict=True):
            (a, i), (b, j) = hashes.place(one), hashes.place(other)
            if index.shard(a).key(i) == (key := index.shard(b).key(j)):
                (index.root / "index.json").unlink()
                raise ValueError(
                    f"{index.root}: the key {key!r} is in {index.names[a]} and in {index.names[b]}; import sources with"
                    " equal keys into separate folders and mix them in training, or give --number-keys to"
                    " webdataset_shards.py"
                )
