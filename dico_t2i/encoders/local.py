"""Finds and loads the files of pretrained models: from a local folder, a cache, or the hub or a URL if allowed.

"package:NAME/FOLDER" stands for a folder of an installed Python package, which is found without importing the package.

DICO_WEIGHTS in the environment names a folder that `dico prefetch` has filled; it is searched before the cache. The
network is used only with DICO_ALLOW_DOWNLOAD=1 in the environment, because compute nodes often have none, where
attempts to connect take minutes to fail.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from dico_t2i.files import temporary
from dico_t2i.remote import download, is_url

ALLOW_DOWNLOAD = "DICO_ALLOW_DOWNLOAD"
WEIGHTS_FOLDER = "DICO_WEIGHTS"
PACKAGE = "package:"  # begins the name of a folder of an installed Python package
URL_CACHE = Path("~/.cache/dico_t2i/files")  # files from URLs, in a folder for each URL

_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
# The files of an exported folder that training can start from.
_EXPORT = (("config.yaml",), ("export.json",), ("model.safetensors", "transformer/diffusion_pytorch_model.safetensors"))

Finder = Callable[[str], Path | None]


class MissingModelError(ValueError):
    """Raised if a model's files cannot be found; the message says where they were searched and how to get them."""


def download_allowed() -> bool:
    """Whether the user allows this process to use the hub, and URLs of models."""
    return os.environ.get(ALLOW_DOWNLOAD) == "1"


@contextmanager
def downloads(allowed: bool) -> Iterator[None]:
    """Allow or forbid this process to use the hub and URLs inside the context."""
    before = os.environ.pop(ALLOW_DOWNLOAD, None)
    if allowed:
        os.environ[ALLOW_DOWNLOAD] = "1"
    try:
        yield
    finally:
        os.environ.pop(ALLOW_DOWNLOAD, None)
        if before is not None:
            os.environ[ALLOW_DOWNLOAD] = before


# huggingface_hub reads this once, when it is first imported.
if not download_allowed():
    os.environ["HF_HUB_OFFLINE"] = "1"


def prefetched(weights: Path, name: str) -> Path:
    """Where `dico prefetch` puts a model inside its folder: under its hub id, or the last name of its path or URL."""
    name = name.removeprefix(PACKAGE)
    return weights / (name if is_hub_id(name) else Path(name).name)


def resolve(name: str, files: Sequence[Sequence[str]], key: str) -> list[Path]:
    """The local paths of a model's files, all from one place.

    name: a local folder, a hub id, the URL of a folder, or a package's folder. files: the possible names of each file,
    the preferred one first. key: the config key that holds the name, for the error message. Raises MissingModelError,
    without using the network unless it is allowed.
    """
    looked = []
    for place, find in _places(name):
        try:
            paths = [next((path for file in names if (path := find(file))), None) for names in files]
        except OSError as error:  # all errors of the hub and the network are OSErrors
            looked.append(f"{place}: {str(error).splitlines()[0]}")
            continue
        found = [path for path in paths if path is not None]
        if len(found) == len(files):
            return found
        gaps = [" or ".join(names) for names, path in zip(files, paths, strict=True) if path is None]
        looked.append(f"{place}: lacks {', '.join(gaps)}" if found else f"{place}: not found")
    raise MissingModelError(_explain(name, files, key, looked))


def find_weights(name: str, key: str) -> list[Path]:
    """The local path of weights that a config names: a run, a checkpoint, an exported folder or a file.

    A hub id or URL stands for an exported folder, of which config, origin and weights are returned; followed by the
    name of a file of weights it stands for that file. Raises MissingModelError as ``resolve`` does.
    """
    place = weights_place(name)
    if place is None:
        return [Path(name).expanduser()]
    return resolve(place, _EXPORT if place == name else [[name.rpartition("/")[2]]], key)


def weights_place(name: str) -> str | None:
    """The hub id or URL of the folder that holds the weights; None if they are a local path."""
    folder, _, file = name.rpartition("/")
    place = folder if file.endswith(_WEIGHTS) else name
    known = is_url(place) or is_hub_id(place)
    return place if known and not Path(name).expanduser().exists() else None


def read_json(path: Path) -> dict:
    """A model's config. Raises ValueError with the path if it is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}; download the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object, found {type(content).__name__}; download it again")
    return content


@contextmanager
def reading(weights: Path) -> Iterator[None]:
    """Turn the errors that libraries raise for damaged or wrong weight files into a ValueError that names the file."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, UnpicklingError, RuntimeError, OSError) as error:
        raise ValueError(f"{weights}: cannot be loaded; download it again if it is incomplete: {error}") from error


def read_tensors(weights: Path) -> dict[str, Any]:
    """What is in a weight file: the tensors of safetensors; of torch's format, tensors and plain values only."""
    if weights.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(weights)
    held: dict[str, Any] = torch.load(weights, map_location="cpu", weights_only=True)
    return held


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bar and its report of unused weights, such as those of CLIP's image tower."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_transformers(model: Any, folder: Path, weights: Path, unused: str | None = None) -> Any:
    """A model of transformers, in float32, from its folder. Raises ValueError if weights are missing.

    unused: the beginning of the names of weights that may be missing.
    """
    with reading(weights), quiet_transformers():
        module, report = model.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=weights.suffix != ".bin",
            local_files_only=True,
            output_loading_info=True,
        )
    if unused:
        report = {"missing_keys": [key for key in report["missing_keys"] if not key.startswith(unused)]}
    check_whole(weights, report)
    return module


def load_diffusers(model: Any, name: str | Path, dtype: torch.dtype, **options: Any) -> Any:
    """A model of diffusers, in eval mode, from a folder or hub id. Raises ValueError if weights are missing."""
    network, report = model.from_pretrained(
        name,
        dtype=dtype,
        low_cpu_mem_usage=find_spec("accelerate") is not None,  # avoids a warning if accelerate is not installed
        output_loading_info=True,
        **options,
    )
    check_whole(name, report)
    return network.eval().requires_grad_(False)


def check_whole(weights: str | Path, report: Mapping[str, Iterable[str]]) -> None:
    """Raise ValueError if weights are missing, which both libraries would leave at random values."""
    if report["missing_keys"]:
        raise ValueError(f"{weights}: lacks {', '.join(sorted(report['missing_keys'])[:5])}")


def file_hash(path: Path) -> str:
    """The sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def config_hash(config: dict) -> str:
    """sha256 of a model's config, without the keys starting with ``_`` that libraries add when saving."""
    content = {key: value for key, value in config.items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _places(name: str) -> Iterator[tuple[str, Finder]]:
    if name.startswith(PACKAGE):
        yield _in_package(name.removeprefix(PACKAGE))
    elif not is_url(name):
        yield _in_folder(Path(name).expanduser())
    if weights := os.environ.get(WEIGHTS_FOLDER):
        yield _in_folder(prefetched(Path(weights).expanduser(), name))
    if is_url(name):
        yield _in_folder(_copies(name))
        if download_allowed():
            yield name, lambda file: _fetch(name, file)
    if not is_hub_id(name):
        return
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    yield str(cache), lambda file: Path(path) if isinstance(path := _cached(name, file), str) else None
    if download_allowed():
        yield f"{constants.ENDPOINT}/{name}", lambda file: _download(name, file)


def _in_package(name: str) -> tuple[str, Finder]:
    package, _, folder = name.partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        return f"the Python package {package}, which is not installed", lambda file: None
    return _in_folder(Path(spec.submodule_search_locations[0], folder))


def _in_folder(folder: Path) -> tuple[str, Finder]:
    return str(folder.absolute()), lambda file: path if (path := folder / file).is_file() else None


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id, such as openai/clip-vit-large-patch14."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def _cached(name: str, file: str) -> object:
    from huggingface_hub import try_to_load_from_cache

    return try_to_load_from_cache(name, file)


def _download(name: str, file: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file))
    except RemoteEntryNotFoundError:
        return None


def _copies(url: str) -> Path:
    """The folder of the local copies of a URL's files."""
    return URL_CACHE.expanduser() / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


def _fetch(url: str, file: str) -> Path | None:
    """Download a file of a URL, unless there is a copy. Returns None if the server has no such file."""
    path = _copies(url) / file
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = temporary(path)
    try:
        download(f"{url.rstrip('/')}/{file}", part)
        part.replace(path)
    except FileNotFoundError:
        return None
    finally:
        part.unlink(missing_ok=True)
    return path


def _explain(name: str, files: Sequence[Sequence[str]], key: str, looked: Sequence[str]) -> str:
    lines = [f"{key}: no usable copy of {name!r} was found. Searched in:", *(f"  {line}" for line in looked)]
    wanted = " ".join(dict.fromkeys(names[0] for names in files))
    if is_url(name):
        lines.append(f"Set {ALLOW_DOWNLOAD}=1 to let this machine download {wanted}, or use dico prefetch.")
        return "\n".join(lines)
    if name.startswith(PACKAGE):
        return "\n".join([*lines, f"Install the package, or set {key} to a folder with these files or to a hub id."])
    if not is_hub_id(name):
        return "\n".join([*lines, f"Set {key} to a folder with these files, to a hub id, or to a URL."])
    lines += [
        "On a machine with network access, run",
        f"  hf download {name} {wanted} --local-dir {name.split('/')[1]}",
        f"and set {key} to that folder.",
    ]
    if not download_allowed():
        lines.append(f"Or set {ALLOW_DOWNLOAD}=1 to let this machine download it.")
    return "\n".join(lines)
