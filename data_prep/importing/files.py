"""Lists the files of a source, and finds the files that tables and annotations name."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from data_prep.importing.filters import Dropped
from dico_t2i.data.decode import IMAGE_EXTENSIONS

EXTENSIONS = tuple(f".{name}" for name in IMAGE_EXTENSIONS)  # extensions of image files


class File(NamedTuple):
    """A file, by its path relative to the root. "text": a text file with the name of an image beside it."""

    name: str
    kind: Literal["image", "text", "other"]


def is_image(name: str) -> bool:
    """Whether a file has an image's extension; whether it is one is decided by its content, later."""
    return name.lower().endswith(EXTENSIONS)


def not_read(name: str) -> Dropped:
    """A skipped file of a kind that is not read, counted by its extension."""
    return Dropped(f"files that are not read ({Path(name).suffix.lower() or 'no extension'})", name)


def walk(root: Path) -> Iterator[File | Dropped]:
    """Yield all files of a folder and its subfolders, by name, relative to ``root``; links are followed.

    A folder that leads back to itself is skipped. Only one folder's names are in memory at a time.
    """
    return _walk(root, "", frozenset({_identity(root)}))


def _walk(root: Path, folder: str, above: frozenset[tuple[int, int]]) -> Iterator[File | Dropped]:
    with os.scandir(root / folder) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries)
    images = {os.path.splitext(name)[0] for name, is_folder in found if is_image(name) and not is_folder}  # noqa: PTH122
    for name, is_folder in found:
        path = f"{folder}/{name}" if folder else name
        if not is_folder:
            stem, extension = os.path.splitext(name)  # noqa: PTH122
            text = extension.lower() == ".txt" and stem in images
            yield File(path, "image" if is_image(name) else "text" if text else "other")
        elif (inner := _identity(root / path)) in above:
            yield Dropped("links to a folder that they are in", path)
        else:
            yield from _walk(root, path, above | {inner})


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def place_in(root: Path, path: str) -> Path | None:
    """The file of a path that is absolute or relative to ``root``; None if it is outside ``root``.

    The path may contain the root's name as given, or with its links resolved. Links inside are followed.
    """
    absolute = os.path.abspath(root / path)  # noqa: PTH100 links must not be resolved
    if _is_below(absolute, os.path.abspath(root)):  # noqa: PTH100
        return Path(absolute)
    folder, name = os.path.split(absolute)
    try:
        resolved = os.path.join(os.path.realpath(folder), name)  # noqa: PTH118
    except (OSError, ValueError):
        return None
    return Path(resolved) if _is_below(resolved, os.path.realpath(root)) else None


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(os.path.join(folder, ""))  # noqa: PTH118 text, not a file
