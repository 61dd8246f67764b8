"""Images to put into shards, and shards read back."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dico_t2i.data.index import load_index
from dico_t2i.data.reader import ShardReader


def image_bytes(seed: int, size: tuple[int, int] = (60, 40), form: str = "JPEG", **options: Any) -> bytes:
    """A smooth random image, (width, height) pixels, in some format."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, form, **options)
    return buffer.getvalue()


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """All samples of a data set, in order."""
    index = load_index(folder)
    reader = ShardReader(index)
    places = [(shard, member) for shard, n in enumerate(index.samples.tolist()) for member in range(n)]
    return [reader.read(shard, member) for shard, member in places]


def tar_bytes(folder: Path) -> dict[str, bytes]:
    """The shards of a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}
