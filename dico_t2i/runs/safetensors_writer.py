"""Writes safetensors files one tensor at a time, so that memory holds no second copy of all tensors."""

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
    """Write fp32 arrays, in the order of ``shapes``, flush them to disk and return the SHA-256 of the file.

    The hash is computed from the arrays, not from the file, so that reading the file later shows whether it is intact.
    """
    entries: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}  # required by transformers
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
            raise ValueError(f"{path}: the sizes of the arrays differ from the shapes")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array, "<f4").reshape(-1).view(np.uint8).data
