"""The list of a large data set's shards in a form that opens at once: ``index.arrays`` beside ``index.json``.

``index.json`` is the index, and the only file that must exist. ``index.arrays`` (safetensors) repeats its content, with
its SHA-256, so that a file that is missing, damaged or of a different index is ignored. The arrays are not read but
mapped into memory: the processes of a node share one copy.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from dico_t2i.data.names import Names
from dico_t2i.files import write_atomically
from dico_t2i.memory import lock

FILE = "index.arrays"
MIN_SHARDS = 1000  # with fewer shards, index.json alone is read as quickly

_NO_SUM = "--------"  # as long as a CRC-32 in hexadecimal; takes its place while it is computed
_TYPES = {"U8": np.uint8, "I64": np.int64}


@dataclass(frozen=True)
class Table:
    """The content of ``index.json``.

    kind, meta: as in the file. names: of the shards. samples, bytes: int64 (shards,), of each. bucket_counts: int64
    (shards, buckets), the samples of each bucket; None if buckets were not assigned.
    """

    kind: Any
    names: Names
    samples: np.ndarray
    bytes: np.ndarray
    meta: dict[str, Any]
    bucket_counts: np.ndarray | None = None


def save_table(table: Table, root: Path, content: bytes) -> None:
    """Write ``index.arrays`` for an ``index.json`` with this content, or delete it if there are few shards."""
    if len(table.names) < MIN_SHARDS:
        (root / FILE).unlink(missing_ok=True)
        return
    names = np.ascontiguousarray(table.names.encoded)
    arrays = {"names": names.view(np.uint8).reshape(len(names), -1), "samples": table.samples, "bytes": table.bytes}
    if table.bucket_counts is not None:
        arrays["bucket_counts"] = table.bucket_counts
    about = {"index": _digest(content), "kind": str(table.kind), "meta": json.dumps(table.meta), "crc32": _NO_SUM}
    file = save(arrays, metadata=about)
    write_atomically(root / FILE, file.replace(_NO_SUM.encode(), f"{zlib.crc32(file):08x}".encode(), 1))


def load_table(root: Path, content: bytes) -> Table | None:
    """The table of an ``index.json`` with this content; None if there is no file for it."""
    try:
        arrays, about = _mapped(root / FILE)
        if about["index"] != _digest(content):
            return None
        names, meta = arrays["names"], dict(json.loads(about["meta"]))
        listed = Names(names.view(f"S{names.shape[1]}")[:, 0])
        table = Table(about["kind"], listed, arrays["samples"], arrays["bytes"], meta, arrays.get("bucket_counts"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError):
        return None
    return table if _fits(table) else None


def _fits(table: Table) -> bool:
    """Whether all arrays have the shapes of a table."""
    shards = len(table.names)
    shapes: list[tuple[np.ndarray, tuple[int, ...]]] = [(table.samples, (shards,)), (table.bytes, (shards,))]
    if table.bucket_counts is not None:
        shapes.append((table.bucket_counts, (shards, len(table.meta.get("buckets", ())))))
    return all(array.shape == shape and array.dtype == np.int64 for array, shape in shapes)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _mapped(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of the file, which cannot be changed, and its metadata. Raises OSError, ValueError, KeyError, ..."""
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    about = header.pop("__metadata__")
    before = content[:start].replace(about["crc32"].encode(), _NO_SUM.encode(), 1)
    if int(about["crc32"], 16) != zlib.crc32(memoryview(content)[start:], zlib.crc32(before)):
        raise ValueError(f"{path}: damaged")
    # Pages that are not locked may have to be read again, which ends the process if the file system fails then, or if
    # the file was replaced on another machine.
    shared = lock(np.frombuffer(content, np.uint8))
    arrays = {}
    for name, tensor in header.items():
        low, high = tensor["data_offsets"]
        dtype = np.dtype(_TYPES[tensor["dtype"]])
        array = np.frombuffer(content, dtype, (high - low) // dtype.itemsize, start + low).reshape(tensor["shape"])
        arrays[name] = array if shared else array.copy()
    return arrays, about
