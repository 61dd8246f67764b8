"""Measures how much each data set of a mixture contributes to training."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dico_t2i.training.observers.groups import group_sums
from dico_t2i.training.ranks.distributed import mean_over_ranks


class SourceLosses:
    """The mean loss of each data set between two reports."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names)
        self._sums = torch.zeros(len(self.names), 2, device=device)  # losses, samples

    def add(self, sources: Tensor | None, losses: Tensor) -> None:
        """Add the losses (n,) of a micro-batch from these sources (n,); None without a mixture."""
        if sources is None:
            return
        values = torch.stack((losses.detach().float(), torch.ones_like(losses, dtype=torch.float32)), dim=1)
        self._sums += group_sums(values, sources.to(losses.device, non_blocking=True), len(self.names))

    def report(self, counts: np.ndarray) -> dict[str, float]:
        """The loss since the last report, the samples so far and their fraction, for each source; collective.

        counts: the samples so far of each source, int64 (sources,).
        """
        losses, samples = mean_over_ranks(self._sums).T.tolist()
        self._sums.zero_()
        values: dict[str, float] = {}
        for number, name in enumerate(self.names):
            values[f"samples/{name}"] = int(counts[number])
            values[f"fraction/{name}"] = float(counts[number] / max(1, counts.sum()))
            if samples[number]:
                values[f"loss/{name}"] = losses[number] / samples[number]
        return values
