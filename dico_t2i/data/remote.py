"""Files at a URL: the one way to fetch them, with the server's status kept in the error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dico_t2i.data.errors import DataError

_CONNECT_S, _SILENCE_S = 30.0, 60.0  # of a web server, after which a download has failed
_GONE = (404, 410)
_PASSING = (408, 425, 429)  # of the statuses below 500; with the others asking again is of no use

Result = TypeVar("Result")


class RefusedError(OSError):
    """A server that answers, but does not give a file, and will not if it is asked again at once."""


def is_url(place: str) -> bool:
    return "://" in place


def without_query(url: str) -> str:
    """A URL without what follows "?" or "#": a signature is renewed, and is nobody else's business."""
    return url.partition("?")[0].partition("#")[0] if is_url(url) else url


def base_name(place: str) -> str:
    """The file name that a path or URL ends with."""
    return without_query(place).rstrip("/").rpartition("/")[2]


def read(url: str) -> bytes:
    """A file's content. Raises OSError, FileNotFoundError if the server says that it is not there."""
    with _remote_errors(url):
        system, path = file_system(url)
        content: bytes = system.cat_file(path)
        return content


def download(url: str, to: Path) -> None:
    """Write a file's content to ``to``, from its first byte to its last in one request. Raises OSError as ``read``."""
    with _remote_errors(url):
        system, path = file_system(url)
        system.get_file(path, str(to))


def describe(url: str) -> dict[str, Any]:
    """Size in bytes and ETag of a file, as far as its server gives them. Raises OSError as ``read``."""
    with _remote_errors(url):
        system, path = file_system(url)
        about = system.info(path)
        return {name: about.get(name) for name in ("size", "ETag")}


def patiently(work: Callable[[], Result], retries: int, wait_s: float) -> Result:
    """The result of ``work``, tried again where it raises OSError after wait_s, twice that, ... seconds.

    FileNotFoundError and RefusedError are raised at once, any other when the last try fails.
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
    """The file system of a URL, as fsspec has it, and the path there. Raises DataError if a package is missing."""
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
        remedy = "pip install dico_t2i[s3]" if scheme in ("s3", "s3a") else str(error)
        raise DataError(f"{url}: {scheme}:// needs another package: {remedy}") from None
    except ValueError as error:
        raise DataError(f"{url}: {error}") from None


@contextmanager
def _remote_errors(url: str) -> Iterator[None]:
    """File systems of fsspec raise errors of their own kinds; here they become OSError."""
    try:
        yield
    except PermissionError as error:
        raise RefusedError(f"{without_query(url)}: refused: {error}") from None
    except (OSError, DataError) as error:
        if getattr(error, "status", None) is None:
            raise
        raise _of_status(url, error) from None
    except Exception as error:
        if getattr(error, "status", None) is None:
            raise OSError(f"{without_query(url)}: {type(error).__name__}: {error}") from error
        raise _of_status(url, error) from None


def _of_status(url: str, error: Any) -> OSError:
    """The error of an HTTP status."""
    text = f"{without_query(url)}: HTTP {error.status} {getattr(error, 'message', '')}".rstrip()
    if error.status in _GONE:
        return FileNotFoundError(text)
    if 400 <= error.status < 500 and error.status not in _PASSING:
        return RefusedError(f"{text} (a signature that has expired, or no permission?)")
    return OSError(text)
