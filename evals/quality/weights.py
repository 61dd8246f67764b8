"""Finds the weights of the FID Inception. Imports nothing heavy, so that a missing file is reported at once."""

import hashlib
import os
import urllib.request
from pathlib import Path
from typing import NamedTuple

from dico_t2i.files import temporary
from evals.quality.protocol import STATE_DICT, TORCHSCRIPT, Extractor

SEEDED = "seeded"
CACHE = Path("~/.cache/dico_t2i")

_SOURCES = {
    STATE_DICT: "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + STATE_DICT,
    TORCHSCRIPT: "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/" + TORCHSCRIPT,
}


class MissingWeightsError(ValueError):
    """Raised if an extractor's weights are not found; the message says where they may be and how to get them."""


class Weights(NamedTuple):
    """A file of weights; None is the seeded network. doubt: why its numbers are not comparable."""

    path: Path | None
    sha256: str
    doubt: str | None


def find_weights(extractor: Extractor, given: Path | None, cache: Path) -> Weights:
    """The file of a protocol's extractor: ``given``, or else from the cache, or else downloaded if that is allowed.

    ``seeded`` means random weights. Raises MissingWeightsError at once if the file is not found, and ValueError if the
    download is not the expected file.
    """
    if str(given) == SEEDED:
        return Weights(None, SEEDED, "seeded extractor")
    cached = cache.expanduser() / extractor.file
    path = given.expanduser() if given else cached
    if not path.is_file():
        if given or os.environ.get("DICO_ALLOW_DOWNLOAD") != "1":
            raise MissingWeightsError(_explain(extractor, path))
        _download(extractor, cached)
    if path.suffix != Path(extractor.file).suffix:
        raise ValueError(
            f"--extractor {path}: this protocol reads {extractor.file}, a {Path(extractor.file).suffix} file"
        )
    sha256 = _sha256(path)
    known = sha256.startswith(extractor.sha256 or "")
    doubt = None if known else f"extractor with different weights: sha256 {sha256[:8]}, not {extractor.sha256}"
    return Weights(path, sha256, doubt)


def _download(extractor: Extractor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = temporary(path)
    try:
        urllib.request.urlretrieve(_SOURCES[extractor.file], part)
    except OSError as error:
        raise MissingWeightsError(f"{_explain(extractor, path)}\nThe download failed: {error}") from None
    found = _sha256(part)
    if not found.startswith(extractor.sha256 or ""):
        part.unlink()
        raise ValueError(
            f"{_SOURCES[extractor.file]}: sha256 {found}, expected {extractor.sha256}...; the file was deleted"
        )
    part.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _explain(extractor: Extractor, path: Path) -> str:
    known = f"about 91 MiB, sha256 {extractor.sha256}..." if extractor.sha256 else "about 91 MiB, sha256 not recorded"
    return (
        f"{path}: no such file; it must contain the FID Inception ({known})\n"
        f"On a machine with network access run\n  curl -L -o {extractor.file} {_SOURCES[extractor.file]}\n"
        f"and give it as --extractor {extractor.file}, or put it into {CACHE}; or set DICO_ALLOW_DOWNLOAD=1.\n"
        f"--extractor {SEEDED} uses random weights, to try everything out; its numbers are not comparable."
    )
