"""Files that are there whole or not at all, also after a crash."""

import os
import uuid
from pathlib import Path


def temporary(path: Path) -> Path:
    """A name beside ``path`` that no other process uses and no search for shards finds."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a temporary name, force to disk, rename."""
    part = temporary(path)
    try:
        part.write_bytes(content)
        flush(part)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Force a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
