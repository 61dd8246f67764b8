"""Collects all pretrained files that a config needs in one folder, for machines without network access.

DIR/manifest.json               sizes and hashes, written last
DIR/<hub id>/<file>             files that encoders and init find with DICO_WEIGHTS=DIR; of a URL, DIR/<its last name>
DIR/files/<name>                single files, such as the weights of an evaluation's feature extractor
"""

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dico_t2i.config import Config
from dico_t2i.encoders import MissingModelError, find_autoencoder, find_vision_encoder
from dico_t2i.encoders.local import downloads, file_hash, find_weights, is_hub_id, prefetched, weights_place
from dico_t2i.encoders.text import find_tower, pretrained_source
from dico_t2i.files import flush, temporary, write_atomically
from dico_t2i.remote import is_url

MANIFEST = "manifest.json"
FILES = "files"
_PROBE_S = 10.0
_BLOCK = 1 << 20

Report = Callable[[str], None]


class PrefetchError(ValueError):
    """Raised if files cannot be downloaded or do not match the manifest; the message lists them."""


def prefetch(config: Config, out: Path, urls: Sequence[str] = (), report: Report = print) -> None:
    """Copy or download what the config needs into ``out``, and each of ``urls`` into ``out``/files.

    Files that are complete already are kept. Local folders and the cache are used first, and the network for the rest.
    huggingface_hub must have been imported with DICO_ALLOW_DOWNLOAD=1, or it stays offline. Raises PrefetchError or
    MissingModelError.
    """
    manifest = _read_manifest(out)
    _ask_network_once(config, [url for url in urls if not _is_whole(out, _url_target(url), manifest)])

    def add(target: Path, source: str, write: Callable[[Path], object]) -> None:
        if not _is_whole(out, target, manifest):
            report(f"{target} from {source}")
            _place(out / target, write)
            manifest[str(target)] = {
                "sha256": file_hash(out / target),
                "bytes": (out / target).stat().st_size,
                "source": source,
            }
        _write_manifest(out, manifest)

    with downloads(allowed=True):
        for name, find in _models(config).items():
            for file in dict.fromkeys(find()):
                add(prefetched(Path(), name) / file.name, name, partial(shutil.copyfile, file))
    for url in urls:
        add(_url_target(url), url, partial(_download, url))


def check(out: Path, config: Config | None = None) -> int:
    """Compare every file of the folder with the manifest by its hash. Returns the number of files.

    With a config, the models that it needs must be among them. Raises PrefetchError that lists what is wrong.
    """
    if not (out / MANIFEST).exists():
        raise PrefetchError(
            f"{out}: it has no {MANIFEST}; fill the folder with dico prefetch --config FILE --out {out}"
        )
    manifest = _read_manifest(out)
    wrong = [
        f"{name}: {'changed' if (out / name).exists() else 'missing'}"
        for name in manifest
        if not _is_whole(out, Path(name), manifest)
    ]
    if config is not None:
        wrong += [f"{name}: none of its files are there" for name in _models(config) if not _has(manifest, name)]
    if wrong:
        shown = "\n  ".join(wrong)
        raise PrefetchError(
            f"{out}: {len(wrong)} of its files are missing or changed:\n  {shown}\nrun dico prefetch again"
        )
    return len(manifest)


def _models(config: Config) -> dict[str, Callable[[], list[Path]]]:
    """For each pretrained model of a config: its folder, hub id or URL -> a function that finds its files."""
    models: dict[str, Callable[[], list[Path]]] = {}
    if config.autoencoder.kind != "pixels":
        models[config.autoencoder.path] = partial(find_autoencoder, config.autoencoder)
    for tower in config.text_encoder.towers if config.model.condition == "text" else ():
        if tower.weights == "pretrained":
            models[pretrained_source(tower)] = partial(find_tower, tower)
    if config.alignment and config.alignment.encoder.weights == "pretrained":
        encoder = config.alignment.encoder
        models[encoder.model] = partial(find_vision_encoder, encoder)
    if config.init and (place := weights_place(config.init.from_)):
        models[place] = partial(find_weights, config.init.from_, "init.from")
    return models


def _ask_network_once(config: Config, urls: Sequence[str]) -> None:
    """Raise PrefetchError within seconds if files are missing and their host cannot be reached.

    The hub's client would try for half a minute with each file.
    """
    missing = {}
    for name, find in _models(config).items():
        try:
            with downloads(allowed=False):
                find()
        except MissingModelError as error:
            if not is_hub_id(name) and not is_url(name):
                raise
            missing[name] = str(error)
    addresses = [*urls, *filter(is_url, missing)]
    hosts = {f"{urlsplit(url).scheme}://{urlsplit(url).netloc}": url for url in addresses}
    if any(map(is_hub_id, missing)):
        from huggingface_hub import constants

        hosts[constants.ENDPOINT] = ", ".join(missing)
    for host, wanted in hosts.items():
        if problem := _unreachable(host):
            details = "".join(f"\n{text}" for text in missing.values())
            raise PrefetchError(f"{host} cannot be reached ({problem}), and these are missing: {wanted}{details}")


def _unreachable(host: str) -> str:
    """The reason why a host does not respond; empty if it responds, even with an error."""
    try:
        urllib.request.urlopen(urllib.request.Request(host, method="HEAD"), timeout=_PROBE_S).close()
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _url_target(url: str) -> Path:
    name = Path(urlsplit(url).path).name
    if urlsplit(url).scheme not in ("https", "http") or not name:
        raise PrefetchError(f"--also {url}: it is not the http(s) address of a file")
    return Path(FILES, name)


def _download(url: str, target: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=60) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, _BLOCK)
            expected = source.headers.get("Content-Length")
    except OSError as error:
        raise PrefetchError(f"{url}: {error}") from error
    if expected is not None and int(expected) != target.stat().st_size:
        raise PrefetchError(f"{url}: only {target.stat().st_size} of {expected} bytes were received; start again")


def _place(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, and rename it when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = temporary(target)
    try:
        write(part)
        flush(part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _is_whole(out: Path, target: Path, manifest: Mapping[str, Any]) -> bool:
    entry, path = manifest.get(str(target)), out / target
    return (
        entry is not None
        and path.is_file()
        and path.stat().st_size == entry["bytes"]
        and file_hash(path) == entry["sha256"]
    )


def _has(manifest: Iterable[str], name: str) -> bool:
    folder = prefetched(Path(), name)
    return any(Path(file).parent == folder for file in manifest)


def _read_manifest(out: Path) -> dict[str, Any]:
    path = out / MANIFEST
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text())["files"])
    except (ValueError, KeyError, TypeError):
        raise PrefetchError(
            f"{path}: it is not a manifest of dico prefetch; delete it and run dico prefetch again"
        ) from None


def _write_manifest(out: Path, files: Mapping[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / MANIFEST, (json.dumps({"files": files}, indent=1) + "\n").encode())
