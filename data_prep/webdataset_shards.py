"""Import webdataset shards, such as img2dataset's: filtered, cropped or unchanged, one output shard for each tar.

python data_prep/webdataset_shards.py --shards /data/laion --out data/laion --caption-fields txt blip_caption \\
    --min-side 256 --min-field aesthetic=5.0 --drop-value NSFW=NSFW

--shards takes folders, tars, and URLs that fsspec reads, with * and {00000..00099}. Captions are members (txt) and
fields of the json member. Folders of plain tars can also be trained on directly; see docs/data_prep.md.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from data_prep.importing.captions import check_encoding
from data_prep.importing.conversion import MAX_FILE, Raw, Unreadable, add_options, run_pipeline, state_of
from data_prep.importing.filters import Dropped
from dico_t2i.command import run, script_parser
from dico_t2i.data.decode import IMAGE_EXTENSIONS
from dico_t2i.data.errors import ShardError
from dico_t2i.data.sample import Caption, captions_in
from dico_t2i.data.shard import ShardIndex, index_shard
from dico_t2i.data.tar import PACKED
from dico_t2i.remote import base_name, describe, download, file_system, is_url, patiently, without_query
from dico_t2i.text_lines import decode_text

RETRIES = 3
FIRST_WAIT_S = 2.0


@dataclass(frozen=True)
class Archive:
    """One tar. name: of the file, preceded by the number of its set if several sets have a file with this name.

    caption_fields: members or fields of the json, all of which are used; if empty, the loader's choice. encoding: of
    text without a byte order mark; None for the loader's rule. prefix: begins all keys.
    """

    url: str = field(repr=False)
    name: str
    caption_fields: tuple[str, ...]
    encoding: str | None
    prefix: str = ""

    def state(self) -> str:
        if not is_url(self.url):
            return state_of(Path(self.url))
        try:
            return json.dumps(describe(self.url))
        except FileNotFoundError:
            return "not there"  # or the server does not report sizes
        except OSError as error:
            raise Unreadable(str(error)) from None

    def read(self, scratch: Path) -> Iterator[Raw | Dropped]:
        """Yield the samples of the tar, which is first downloaded to ``scratch`` unless it is local."""
        try:
            with self._local(scratch) as path:
                table = index_shard(path)
                for place in table.damage:
                    yield Dropped("damaged stretches of archives", f"{self.name}: {place}")
                yield from self._left_out(table)
                with path.open("rb") as file:
                    yield from (self._sample(file, table, member) for member in range(len(table)))
        except FileNotFoundError:
            yield Dropped("missing archives", self.name)
        except (OSError, ShardError) as error:
            reason = str(error).replace(str(scratch), self.name)
            raise Unreadable(reason if self.name in reason else f"{self.name}: {reason}") from None

    @contextmanager
    def _local(self, scratch: Path) -> Iterator[Path]:
        if not is_url(self.url):
            if not Path(self.url).exists():
                raise FileNotFoundError(self.url)
            yield Path(self.url)
            return
        patiently(lambda: download(self.url, scratch), RETRIES, FIRST_WAIT_S)
        yield scratch

    def _left_out(self, table: ShardIndex) -> Iterator[Dropped]:
        """Yield members that are not part of a sample, once for each sample they would have made."""
        there, told = {table.key(member) for member in range(len(table))}, set()
        for reason, member in table.left_out:
            key = member.rpartition("/")[2].partition(".")[0]
            key = member[: len(member) - len(member.rpartition("/")[2])].removeprefix("./") + key
            if key in there:
                yield Dropped(f"members left out: {reason}", f"{self.name}: {member}", part=True)
            elif (key, reason) not in told:
                told.add((key, reason))
                yield Dropped(reason, f"{self.name}: {member}")

    def _sample(self, file: BinaryIO, table: ShardIndex, member: int) -> Raw | Dropped:
        key = table.key(member)
        name = f"{self.name}: {key}"
        places = {
            extension: (int(table.sizes[member, column]), int(table.offsets[member, column]))
            for column, extension in enumerate(table.extensions)
            if table.offsets[member, column] >= 0
        }
        image = next((extension for extension in IMAGE_EXTENSIONS if extension in places), None)
        if image is None:
            return Dropped("samples without an image", f"{name} has {', '.join(places)}")
        wanted = {image, "json", "cls", *(self.caption_fields or ("txt",))} & set(places)
        if max(places[extension][0] for extension in wanted) > MAX_FILE:
            return Dropped(f"members of more than {MAX_FILE} bytes", name)
        read = {extension: os.pread(file.fileno(), *places[extension]) for extension in wanted}
        try:
            return self._raw(self.prefix + key, name, read.pop(image), read)
        except Dropped as dropped:
            return dropped
        except (ValueError, RecursionError) as error:
            return Dropped("unreadable json or cls members", f"{name}: {error}")

    def _raw(self, key: str, name: str, image: bytes, members: dict[str, bytes]) -> Raw:
        """The sample. Raises ValueError for json or cls that cannot be read, and Dropped for such text."""
        about = self._json(members)
        captions, other = list[Caption](), list[str]()
        for caption_field, value, sources, text in self._captions(about, members):
            try:
                found, rest = captions_in(value, sources, text, self.encoding)
            except ValueError as error:
                raise Dropped(f"text that is not {self.encoding or 'utf-8 or cp1252'}", f"{name}: {error}") from None
            captions += [caption if sources else caption._replace(source=caption_field) for caption in found]
            other += rest
        label = int(members["cls"]) if "cls" in members else None
        taken = (*(self.caption_fields or ("txt",)), "captions", "caption_sources", "width", "height")
        kept = {k: v for k, v in about.items() if k not in taken}
        named = len(self.caption_fields) > 1 or "caption_sources" in about
        sources = [caption.source for caption in captions] if named else []
        return Raw(key, image, name, [caption.text for caption in captions], label, kept, sources, other)

    def _json(self, members: dict[str, bytes]) -> dict[str, Any]:
        data = members.get("json", b"{}")
        about = json.loads(data if self.encoding is None else decode_text(data, "json", self.encoding))
        if not isinstance(about, dict):
            raise ValueError("json is not an object")
        return about

    def _captions(self, about: dict[str, Any], members: dict[str, bytes]) -> Iterator[tuple[str, Any, Any, Any]]:
        """Yield each caption field with its value and its sources, or with the bytes of its member."""
        if not self.caption_fields:
            yield "captions", about.get("captions"), about.get("caption_sources"), members.get("txt")
        for name in self.caption_fields:
            member = members.get(name) if name != "json" else None
            yield name, None if member is not None else about.get(name), None, member


def expand(shards: Sequence[str]) -> list[str]:
    """The paths and URLs of tars. Raises ValueError for a pattern without tars, and for a tar that is given twice."""
    found: list[str] = []
    for given in (text for pattern in shards for text in _braces(pattern)):
        tars = _tars(given)
        if not tars:
            raise ValueError(f"--shards {given}: there are no tars{_packed(given)}")
        found += tars
    twice = next((url for url, count in Counter(found).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"--shards: {without_query(twice)} is given twice")
    return found


def _braces(pattern: str) -> Iterable[str]:
    """Expand {00000..00099} and {a,b}; in the names of existing folders and files braces stay."""
    from braceexpand import braceexpand

    there, rest = ("", pattern) if is_url(pattern) else _divided(Path(pattern))
    try:
        return [str(Path(there, text)) if there else text for text in braceexpand(rest)]
    except ValueError:
        return [pattern]  # the brace is part of a name


def _tars(given: str) -> list[str]:
    if not is_url(given):
        if Path(given).is_dir():
            return sorted(str(path) for path in Path(given).glob("*.tar"))
        if Path(given).is_file():
            return [given]
        return sorted(map(str, _glob(Path(given)))) if "*" in given else []
    if "*" not in without_query(given):
        return [given]
    system, pattern = file_system(given)
    return sorted(system.unstrip_protocol(path) for path in system.glob(pattern))


def _glob(pattern: Path) -> Iterator[Path]:
    """Yield the files that fit a pattern; in the names of existing folders characters such as * stay."""
    there, rest = _divided(pattern)
    return Path(there).glob(rest)


def _divided(path: Path) -> tuple[str, str]:
    """The longest part of a path that exists, and the rest."""
    there = next(part for part in (path, *path.parents, Path()) if part.exists())
    return str(there), str(path.relative_to(there)) if there != path else ""


def _packed(given: str) -> str:
    """A hint for a folder of compressed tars."""
    packed = compressed_in(given)
    return f"; {len(packed)} are compressed, such as {packed[0]}: unpack them" if packed else ""


def compressed_in(given: str) -> list[str]:
    """The names of the compressed tars in a folder; none for anything else."""
    folder = Path(given)
    if is_url(given) or not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(PACKED))


class Archives:
    """The tars of a command line, each of which is a unit."""

    contents: ClassVar[tuple[str, ...]] = ("shards", "names")

    def __init__(
        self, urls: list[str], caption_fields: Sequence[str], encoding: str | None, number_keys: bool = False
    ) -> None:
        bases = [base_name(url) for url in urls]
        # Two sets of img2dataset have files with the same names, and samples with the same keys.
        sets = list(dict.fromkeys(without_query(url).rpartition("/")[0] for url in urls))
        several = len(set(bases)) < len(bases)
        numbers = [sets.index(without_query(url).rpartition("/")[0]) for url in urls]
        self.archives = [
            Archive(
                url,
                f"{number}/{base}" if several else base,
                tuple(caption_fields),
                encoding,
                f"{shard:06d}-" if number_keys else f"{number}-" if several else "",
            )
            for shard, (url, base, number) in enumerate(zip(urls, bases, numbers, strict=True))
        ]
        names = "\n".join(archive.name for archive in self.archives)
        self.meta = {
            "source": "webdataset",
            "shards": len(urls),
            "names": hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest(),
            "caption_fields": list(caption_fields),
            **({"number_keys": True} if number_keys else {}),
        }

    def units(self) -> Iterator[Archive]:
        return iter(self.archives)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--shards", nargs="+", required=True, metavar="PLACE", help="folders, tars, URLs")
    add(
        "--caption-fields",
        nargs="+",
        default=(),
        metavar="NAME",
        help="where captions are (default: the json's captions, or else txt)",
    )
    add("--encoding", help="encoding of text members without a byte order mark (default: utf-8, or else cp1252)")
    add("--number-keys", action="store_true", help="put the tar's number before each key, if keys repeat")
    add_options(parser, samples_per_shard=False)
    parser.set_defaults(crop="none")
    args = parser.parse_args(argv)
    if args.encoding is not None:
        check_encoding(args.encoding)
    archives = Archives(expand(args.shards), args.caption_fields, args.encoding, args.number_keys)
    compressed = [name for given in args.shards for name in compressed_in(given)]
    return run_pipeline(archives, args, [Dropped("compressed archives (unpack them)", name) for name in compressed])


if __name__ == "__main__":
    sys.exit(run(main))
