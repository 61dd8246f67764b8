"""Reads and writes files at URLs through fsspec, and keeps the server's status in the errors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

_CONNECT_S, _SILENCE_S = 30.0, 60.0  # limits for connecting to a web server, and for its silence during a download
_GONE = (404, 410)
_PASSING = (408, 425, 429)  # statuses below 500 for which a retry may help
_PART = 4 << 20  # bytes of each of the requests for a long range, which are sent at the same time
_PACKAGES = {
    "s3": "dico_t2i[s3]",
    "s3a": "dico_t2i[s3]",
    "gs": "dico_t2i[gs]",
    "gcs": "dico_t2i[gs]",
    "az": "adlfs",
    "abfs": "adlfs",
}

Result = TypeVar("Result")


class UrlError(ValueError):
    """Raised for a URL that cannot be used here; the message says what to do."""


class RefusedError(OSError):
    """Raised if a server answers but refuses to send a file, so that a retry does not help."""


def is_url(place: str) -> bool:
    return "://" in place


def without_query(url: str) -> str:
    """A URL without the part after "?" or "#", which may hold a signature: these change, and are secret."""
    return url.partition("?")[0].partition("#")[0] if is_url(url) else url


def base_name(place: str) -> str:
    """The file name that a path or URL ends with."""
    return without_query(place).rstrip("/").rpartition("/")[2]


def read(url: str) -> bytes:
    """A file's content. Raises OSError, which is FileNotFoundError if the server has no such file."""
    with _remote_errors(url):
        system, path = file_system(url)
        content: bytes = system.cat_file(path)
        return content


def read_range(url: str, start: int, stop: int) -> bytes:
    """The bytes of a file from ``start`` to ``stop``. Raises OSError as ``read`` does."""
    with _remote_errors(url):
        system, path = file_system(url)
        starts = list(range(start, stop, _PART))
        stops = [min(begin + _PART, stop) for begin in starts]
        return b"".join(system.cat_ranges([path] * len(starts), starts, stops, on_error="raise"))


def files(url: str) -> dict[str, int]:
    """The sizes of all files below a folder, by their path in it; empty without such a folder. Raises OSError."""
    with _remote_errors(url):
        system, path = file_system(url)
        system.invalidate_cache()
        found: dict[str, Any] = system.find(path, detail=True)
        root = path.rstrip("/") + "/"
        return {name.removeprefix(root): about["size"] for name, about in found.items()}


def upload(file: Path, url: str) -> None:
    """Copy a local file to a URL. Raises OSError."""
    with _remote_errors(url):
        system, path = file_system(url)
        _in_folder(system, path, lambda: system.put_file(str(file), path))


def write(url: str, content: bytes) -> None:
    """Write a file at a URL. Raises OSError."""
    with _remote_errors(url):
        system, path = file_system(url)
        _in_folder(system, path, lambda: system.pipe_file(path, content))


def remove(url: str) -> None:
    """Delete a file, or a folder with all its files; nothing happens if there is none. Raises OSError."""
    with _remote_errors(url):
        system, path = file_system(url)
        system.invalidate_cache()
        if system.exists(path):
            system.rm(path, recursive=True)


def download(url: str, to: Path) -> None:
    """Write a file's whole content to ``to``, in a single request. Raises OSError as ``read`` does."""
    with _remote_errors(url):
        system, path = file_system(url)
        system.get_file(path, str(to))


def describe(url: str) -> dict[str, Any]:
    """A file's size in bytes and ETag, if its server provides them. Raises OSError as ``read`` does."""
    with _remote_errors(url):
        system, path = file_system(url)
        about = system.info(path)
        return {name: about.get(name) for name in ("size", "ETag")}


def patiently(work: Callable[[], Result], retries: int, wait_s: float) -> Result:
    """The result of ``work``, which is repeated after an OSError, wait_s, twice that, ... seconds later.

    FileNotFoundError and RefusedError are raised at once, and other errors if the last attempt fails.
    """
    for attempt in range(retries):
        try:
            return work()
        except (FileNotFoundError, RefusedError):
            raise
        except OSError:
            time.sleep(wait_s * 2**attempt)
    return work()


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. Raises UrlError if a package is missing."""
    if url.startswith("hf://") and os.environ.get("DICO_ALLOW_DOWNLOAD") != "1":
        raise UrlError(f"{url}: set DICO_ALLOW_DOWNLOAD=1 to let this machine use the Hugging Face hub")
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
        options = {"client_kwargs": {"timeout": timeout}}
    try:
        return fsspec.url_to_fs(url, **options)
    except ImportError as error:
        scheme = urlsplit(url).scheme
        remedy = f"pip install {_PACKAGES[scheme]}" if scheme in _PACKAGES else str(error)
        raise UrlError(f"{url}: {scheme}:// needs a further package: {remedy}") from None
    except ValueError as error:
        raise UrlError(f"{url}: {error}") from None


def _in_folder(system: Any, path: str, write: Callable[[], None]) -> None:
    """Write a file, after making its folder if that is missing; object stores need none."""
    try:
        write()
    except FileNotFoundError:
        system.makedirs(system._parent(path), exist_ok=True)
        write()


@contextmanager
def _remote_errors(url: str) -> Iterator[None]:
    """Turn the errors of fsspec's file systems into OSError."""
    try:
        yield
    except PermissionError as error:
        raise RefusedError(f"{without_query(url)}: refused: {error}") from None
    except (OSError, UrlError) as error:
        if getattr(error, "status", None) is None:
            raise
        raise _of_status(url, error) from None
    except Exception as error:
        if getattr(error, "status", None) is None:
            raise OSError(f"{without_query(url)}: {type(error).__name__}: {error}") from error
        raise _of_status(url, error) from None


def _of_status(url: str, error: Any) -> OSError:
    """The error for an HTTP status."""
    text = f"{without_query(url)}: HTTP {error.status} {getattr(error, 'message', '')}".rstrip()
    if error.status in _GONE:
        return FileNotFoundError(text)
    if 400 <= error.status < 500 and error.status not in _PASSING:
        return RefusedError(f"{text} (a signature that has expired, or no permission?)")
    return OSError(text)
