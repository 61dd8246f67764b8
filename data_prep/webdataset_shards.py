"""Bring in webdataset shards, such as img2dataset's: filtered, cropped or as they are, one shard for each.

python data_prep/webdataset_shards.py --shards /data/laion --out data/laion --caption-fields txt blip_caption \\
    --min-side 256 --min-field aesthetic=5.0 --drop-value NSFW=NSFW

--shards takes folders, tars, and URLs that fsspec reads, with * and {00000..00099}. Captions are members (txt) and
fields of the json member. Plain tars of a folder train without this too; see docs/data_prep.md.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from data_prep.importing.captions import check_encoding, decode
from data_prep.importing.conversion import MAX_FILE, Raw, Unreadable, add_options, run_pipeline
from data_prep.importing.filters import Dropped
from dico_t2i.command import run, script_parser
from dico_t2i.data.errors import ShardError
from dico_t2i.data.shard import ShardIndex, index_shard

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
RETRIES = 3
FIRST_WAIT_S = 2.0


@dataclass(frozen=True)
class Archive:
    """One tar.

    caption_fields: members or fields of the json, all of which are taken; none stand for what the loader takes, the
    json's captions or else txt. encoding: of text without a byte order mark.
    """

    url: str
    caption_fields: tuple[str, ...]
    encoding: str

    def read(self, scratch: Path) -> Iterator[Raw | Dropped]:
        """Samples of the tar, which is fetched to ``scratch`` first if it is not local."""
        try:
            with self._local(scratch) as path:
                table = index_shard(path)
                for place in table.damage:
                    yield Dropped("damaged stretches of archives", f"{self.url}: {place}")
                with path.open("rb") as file:
                    yield from (self._sample(file, table, member) for member in range(len(table)))
        except FileNotFoundError:
            yield Dropped("missing archives", self.url)
        except (OSError, ShardError) as error:
            raise Unreadable(f"{self.url}: {error}") from None

    @contextmanager
    def _local(self, scratch: Path) -> Iterator[Path]:
        if "://" not in self.url:
            if not Path(self.url).exists():
                raise FileNotFoundError(self.url)
            yield Path(self.url)
            return
        for attempt in range(RETRIES + 1):
            try:
                _fetch(self.url, scratch)
                break
            except FileNotFoundError:
                raise
            except Exception as error:  # each file system has errors of its own
                if attempt == RETRIES:
                    raise OSError(f"{type(error).__name__}: {error}") from None
            time.sleep(FIRST_WAIT_S * 2**attempt)
        yield scratch

    def _sample(self, file: BinaryIO, table: ShardIndex, member: int) -> Raw | Dropped:
        key = table.key(member)
        name = f"{self.url.rpartition('/')[2]}: {key}"
        places = {
            extension: (int(table.sizes[member, column]), int(table.offsets[member, column]))
            for column, extension in enumerate(table.extensions)
            if table.offsets[member, column] >= 0
        }
        image = next((extension for extension in IMAGES if extension in places), None)
        if image is None:
            return Dropped("samples without an image", f"{name} has {', '.join(places)}")
        wanted = {image, "json", "cls", *(self.caption_fields or ("txt",))} & set(places)
        if max(places[extension][0] for extension in wanted) > MAX_FILE:
            return Dropped(f"members of more than {MAX_FILE} bytes", name)
        read = {extension: os.pread(file.fileno(), *places[extension]) for extension in wanted}
        try:
            return self._raw(key, name, read.pop(image), read)
        except UnicodeDecodeError:
            return Dropped(f"text that is not {self.encoding}", name)
        except (ValueError, RecursionError) as error:
            return Dropped("unreadable json or cls members", f"{name}: {error}")

    def _raw(self, key: str, name: str, image: bytes, members: dict[str, bytes]) -> Raw:
        about = json.loads(decode(members.get("json", b"{}"), self.encoding))
        if not isinstance(about, dict):
            raise ValueError("json is no object")
        fields = self.caption_fields or ("captions" if "captions" in about else "txt",)
        captions: list[str] = []
        for caption_field in fields:
            found: Any = about.get(caption_field)
            if caption_field != "json" and caption_field in members:
                found = decode(members[caption_field], self.encoding)
            captions += [text for text in (found if isinstance(found, list) else [found]) if isinstance(text, str)]
        label = int(members["cls"]) if "cls" in members else None
        kept = {k: v for k, v in about.items() if k not in (*fields, "captions", "width", "height")}
        return Raw(key, image, name, captions, label, kept)


def _fetch(url: str, path: Path) -> None:
    import fsspec

    with fsspec.open(url, "rb") as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 22)


def expand(shards: Sequence[str]) -> list[str]:
    """Paths and URLs of tars. Raises ValueError for what stands for none."""
    import fsspec
    from braceexpand import braceexpand

    found: list[str] = []
    for given in (text for pattern in shards for text in braceexpand(pattern)):
        remote = "://" in given
        if not remote and Path(given).is_dir():
            tars = sorted(str(path) for path in Path(given).glob("*.tar"))
        elif "*" in given:
            system, pattern = fsspec.url_to_fs(given)
            tars = sorted(system.unstrip_protocol(path) if remote else str(path) for path in system.glob(pattern))
        else:
            tars = [given] if remote or Path(given).is_file() else []
        if not tars:
            raise ValueError(f"--shards {given}: no tars there")
        found += tars
    return found


class Archives:
    """The tars of a command line, each a unit."""

    def __init__(self, urls: list[str], caption_fields: Sequence[str], encoding: str) -> None:
        names = "\n".join(url.rpartition("/")[2] for url in urls)
        self.urls, self.caption_fields, self.encoding = urls, tuple(caption_fields), encoding
        self.meta = {
            "source": "webdataset",
            "shards": len(urls),
            "names": hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest(),
            "caption_fields": list(caption_fields),
        }

    def units(self) -> Iterator[Archive]:
        return (Archive(url, self.caption_fields, self.encoding) for url in self.urls)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--shards", nargs="+", required=True, metavar="PLACE", help="folders, tars, URLs")
    add("--caption-fields", nargs="+", default=(), metavar="NAME", help="(default: the json's captions, or else txt)")
    add("--encoding", default="utf-8", help="of text members without a byte order mark (default: utf-8)")
    add_options(parser, samples_per_shard=False)
    parser.set_defaults(crop="none")
    args = parser.parse_args(argv)
    check_encoding(args.encoding)
    return run_pipeline(Archives(expand(args.shards), args.caption_fields, args.encoding), args)


if __name__ == "__main__":
    sys.exit(run(main))
