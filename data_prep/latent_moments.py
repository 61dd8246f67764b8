"""The mean and the scale of each channel of latents: sums of each shard in a file beside it, and their total."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dico_t2i.files import write_atomically

FOLDER = "sums"


class Sums:
    """Sums over the latents of a shard, by channel, in float64: their number, their means and their second moments."""

    def __init__(self) -> None:
        self.count = 0
        self.first: np.ndarray | float = 0.0
        self.second: np.ndarray | float = 0.0

    def add(self, moments: np.ndarray) -> None:
        """Add the moments of an image, (2C, h, w), or (2, 2C, h, w) with those of its mirror image."""
        mean, logvar = np.split(moments.astype(np.float64), 2, axis=-3)
        axes = (*range(mean.ndim - 3), -2, -1)
        self.count += mean.size // mean.shape[-3]
        self.first = self.first + mean.sum(axes)
        self.second = self.second + (mean**2 + np.exp(np.clip(logvar, -30, 20))).sum(axes)

    def save(self, shard: Path) -> None:
        """Write the sums beside the shard."""
        lists = [np.asarray(value).tolist() for value in (self.first, self.second)] if self.count else [[], []]
        path = _path(shard)
        path.parent.mkdir(exist_ok=True)
        content = {"count": self.count, "first": lists[0], "second": lists[1]}
        write_atomically(path, (json.dumps(content) + "\n").encode())


def measured(shards: Sequence[Path]) -> dict[str, list[float]] | None:
    """The mean of each channel over all shards, and the scale that gives it variance 1, with six digits.

    None if a shard has no sums, because an older version made it.
    """
    if not all(_path(shard).exists() for shard in shards):
        return None
    found = [json.loads(_path(shard).read_text(encoding="utf-8")) for shard in shards]
    found = [entry for entry in found if entry["count"]]
    if not found:
        return None
    count = sum(entry["count"] for entry in found)
    mean, second = (np.sum([entry[key] for entry in found], axis=0) / count for key in ("first", "second"))
    deviation = np.sqrt(np.maximum(second - mean**2, 1e-12))
    return {"mean": [float(f"{value:.6g}") for value in mean], "scale": [float(f"{1 / d:.6g}") for d in deviation]}


def _path(shard: Path) -> Path:
    return shard.parent / FOLDER / f"{shard.name}.json"
