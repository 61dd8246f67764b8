"""Safetensors files written one tensor at a time, so that no second copy of them is held in memory."""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_safetensors(path: Path, shapes: Mapping[str, Sequence[int]], arrays: Iterable[np.ndarray]) -> str:
    """Write fp32 arrays, in the order of ``shapes``, force them to disk and return the file's SHA-256.

    The hash is of what was given, not of what the disk took: reading the file again tells whether it is whole.
    """
    entries: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        parts = itertools.chain((memoryview(len(header).to_bytes(8, "little") + header),), map(_bytes, arrays))
        for part in parts:
            file.write(part)
            digest.update(part)
        if file.tell() != 8 + len(header) + end:
            raise ValueError(f"{path}: the arrays are not those of the shapes")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array, "<f4").reshape(-1).view(np.uint8).data
