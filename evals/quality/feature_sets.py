"""The features of a set of images that metrics need."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dico_t2i import randomness
from evals.quality.distances import Gaussian, Moments
from evals.quality.features import FEATURES

_ROWS = 1024  # rows that are added to the moments together, in the order of the chunks


@dataclass
class FeatureSet:
    """The features of ``n`` images; n is 0 if it is not known.

    gaussians: by kind of features. rows: pooled features, logits and scores, one row per image. source: where the set
    comes from, for people and for the result. seconds: of sampling, decoding and features.
    """

    n: int
    gaussians: dict[str, Gaussian]
    rows: dict[str, Tensor] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    seconds: Tensor = field(default_factory=lambda: torch.zeros(3))

    def to(self, device: torch.device) -> "FeatureSet":
        """The set with its tensors on a device, where metrics are computed."""
        gaussians = {name: Gaussian(g.mean.to(device), g.cov.to(device)) for name, g in self.gaussians.items()}
        rows = {name: value.to(device) for name, value in self.rows.items()}
        return FeatureSet(self.n, gaussians, rows, self.source, self.doubts, self.seconds)


def collect(chunks: Iterable[dict[str, Tensor]], total: int, manifold: int | None = None) -> FeatureSet:
    """Collect chunks in order; ``manifold`` rows of the pooled features are kept, chosen by a fixed shuffle."""
    kept = torch.ones(total, dtype=torch.bool)
    if manifold and manifold < total:
        kept = torch.zeros(total, dtype=torch.bool)
        kept[torch.from_numpy(randomness.permutation(0, "manifold", 0, total)[:manifold])] = True
    found = FeatureSet(0, {})
    moments: dict[str, Moments] = {}
    waiting: dict[str, list[Tensor]] = {}
    rows: dict[str, list[Tensor]] = {}
    for chunk in chunks:
        kinds = {name: kind for name, kind in FEATURES.items() if name in chunk}
        n = max((len(chunk[name]) for name in kinds), default=0)
        for name, kind in kinds.items():
            if kind.gaussian:
                waiting.setdefault(name, []).append(chunk[name])
            if kind.rows:
                rows.setdefault(name, []).append(chunk[name][kept[found.n : found.n + n]])
        found.n += n
        found.seconds = found.seconds + chunk.get("seconds", torch.zeros(3))
        _add(moments, waiting, _ROWS)
    _add(moments, waiting, 1)
    found.gaussians = {name: value.gaussian() for name, value in moments.items()}
    found.rows = {name: torch.cat(parts) for name, parts in rows.items()}
    return found


def _add(moments: dict[str, Moments], waiting: dict[str, list[Tensor]], least: int) -> None:
    """Move waiting rows into the moments if there are at least ``least``."""
    for name, parts in waiting.items():
        if sum(map(len, parts)) >= least:
            features = torch.cat(parts)
            moments.setdefault(name, Moments(features.shape[1])).add(features)
            parts.clear()
