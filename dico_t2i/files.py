"""Writes files atomically: even after a crash, a file is either complete or absent."""

import os
import uuid
from pathlib import Path


def temporary(path: Path) -> Path:
    """A path beside ``path`` that no other process uses and that no search for shards finds."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a temporary name, flush to disk, and rename."""
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
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
