"""Aspect-ratio buckets: shapes of about equal area. Each image of a data set is cropped to the nearest shape.

The network is convolutional and takes any height and width that are multiples of 32 pixels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from dico_t2i.data.decode import IMAGE_EXTENSIONS, read_header
from dico_t2i.data.errors import DataError, SampleError
from dico_t2i.data.index import DatasetIndex, in_threads, load_index, write_index
from dico_t2i.data.shard import MOMENTS, ShardIndex, ShardSummary, index_path
from dico_t2i.data.sources import MULTIPLE

MAX_RATIO = 2.0
_HEADER_BYTES = 1 << 16  # these contain an image's size, unless long metadata comes first

Shape = tuple[int, int]  # height, width in pixels


def bucket_shapes(base: int, max_ratio: float = MAX_RATIO) -> list[Shape]:
    """The shapes of at most base x base pixels, from tall to wide.

    Each height that is a multiple of 32 gets the largest width that is also a multiple of 32 and stays within that
    number of pixels. Shapes whose sides have a ratio above ``max_ratio`` are left out. Raises DataError if base is not
    a multiple of 32.
    """
    if base < MULTIPLE or base % MULTIPLE:
        raise DataError(f"buckets of {base} pixels: the size must be a multiple of {MULTIPLE}")
    tall = range(base, int(base * max_ratio) + 1, MULTIPLE)
    pairs = [(height, base * base // height // MULTIPLE * MULTIPLE) for height in tall]
    pairs = [(height, width) for height, width in pairs if width and height <= max_ratio * width]
    return [*reversed(pairs), *((width, height) for height, width in pairs[1:])]


def nearest_bucket(height: int, width: int, shapes: Sequence[Shape]) -> int:
    """The index of the shape with the nearest aspect ratio, compared by logarithm; the first of equally near ones."""
    wanted = math.log(width / height)
    return min(range(len(shapes)), key=lambda i: abs(math.log(shapes[i][1] / shapes[i][0]) - wanted))


def assign_buckets(root: str | Path, shapes: Sequence[Shape]) -> DatasetIndex:
    """Write the nearest bucket of each image of a data set to its index; the tars are not changed.

    Only the images' headers are read. Images whose size cannot be read get the bucket nearest to a square, since
    training replaces them anyway. Raises DataError if the folder does not hold images.
    """
    index = load_index(root)
    if index.kind != "images":
        raise DataError(f"{root}: holds {index.kind}, whose shapes are fixed; assign buckets to images before encoding")
    in_threads(partial(_assign, shapes=shapes), [index.path(n) for n in range(len(index.names))], "assigning buckets")
    return write_index(root, index.kind, {**index.meta, "buckets": [list(shape) for shape in shapes]})


def assign_missing(tars: Sequence[Path], shapes: Sequence[Shape]) -> None:
    """Assign buckets to the images of these shards, except for those whose buckets already have these shapes."""
    known = in_threads(lambda tar: ShardSummary.load(index_path(tar)), tars, "reading the shards' indexes")
    left = [tar for tar, summary in zip(tars, known, strict=True) if summary.shapes != tuple(shapes)]
    in_threads(partial(_assign, shapes=shapes), left, "assigning buckets")


def describe_buckets(index: DatasetIndex) -> str:
    """One line for each bucket: its shape and its number of samples."""
    assert index.bucket_counts is not None
    counts = index.bucket_counts.sum(0).tolist()
    return "\n".join(f"  {h} x {w}: {count}" for (h, w), count in zip(index.buckets, counts, strict=True))


def _assign(tar: Path, shapes: Sequence[Shape]) -> None:
    table, square = ShardIndex.load(index_path(tar)), nearest_bucket(1, 1, shapes)
    if MOMENTS in table.extensions:
        raise DataError(f"{tar}: holds latents, whose shapes are fixed; assign buckets to images before encoding")
    columns = [table.extensions.index(name) for name in IMAGE_EXTENSIONS if name in table.extensions]
    buckets = np.full(len(table), square, np.int16)
    with tar.open("rb", buffering=0) as file:
        for row in range(len(table)):
            column = next((c for c in columns if table.offsets[row, c] >= 0), None)
            if column is None:
                continue
            size = _image_size(file.fileno(), int(table.offsets[row, column]), int(table.sizes[row, column]))
            if size is not None:
                buckets[row] = nearest_bucket(*size, shapes)
    replace(table, bucket=buckets, shapes=tuple(shapes)).save(index_path(tar))


def _image_size(descriptor: int, offset: int, length: int) -> Shape | None:
    """The displayed height and width of an image, from its header; None if the header cannot be read."""
    for size in (min(_HEADER_BYTES, length), length):
        try:
            header = read_header(os.pread(descriptor, size, offset))
        except SampleError:
            continue
        return header.height, header.width
    return None
