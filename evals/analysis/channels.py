"""Measures how many of a network's channels are active: activation scores, diversity of features (paper, section 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dico_t2i.models import Network
from dico_t2i.models.blocks import Residual

ALIVE = 0.1  # a channel whose score is below this share of the mean score counts as dead
# What DiCo and its peers call the spatial layer, or the attention, of a block.
MIXERS = ("conv", "attention", "attn", "attn1", "mixer")


class ChannelStatistics:
    """Sums over features from which all numbers of ``report`` are computed; float64 on the features' device."""

    def __init__(self) -> None:
        self.count = 0
        self.activation: Tensor | float = 0.0  # sum of each channel after ReLU
        self.total: Tensor | float = 0.0
        self.products: Tensor | float = 0.0  # (C, C)

    def add(self, features: Tensor) -> None:
        """Add features with channels last: (N, H, W, C) or (N, T, C)."""
        rows = features.detach().flatten(0, -2).double()
        self.count += len(rows)
        self.activation = self.activation + rows.relu().sum(0)
        self.total = self.total + rows.sum(0)
        self.products = self.products + rows.T @ rows

    def scores(self) -> Tensor:
        """Channel activation scores, (C,): the mean over positions and samples of ReLU(feature)."""
        assert isinstance(self.activation, Tensor), "nothing was added"
        return self.activation / self.count

    def covariance(self) -> Tensor:
        """The covariance of the channels over positions and samples, (C, C)."""
        assert isinstance(self.total, Tensor)
        assert isinstance(self.products, Tensor)
        mean = self.total / self.count
        return self.products / self.count - torch.outer(mean, mean)

    def report(self) -> Diversity:
        return diversity(self.scores(), self.covariance())


@dataclass(frozen=True)
class Diversity:
    """The numbers of a layer's channels.

    scores: sorted, the highest first. alive: share of channels whose score is above ALIVE times the mean score.
    participation: (sum s)^2 / (C sum s^2) of the scores: 1 if all are equal, 1/C if only one channel is not 0.
    effective_rank: exp of the entropy of the features' singular values, scaled to sum 1 (Roy, Vetterli 2007), over C.
    correlation: mean absolute correlation of two different channels, without channels that never vary.
    """

    scores: tuple[float, ...]
    alive: float
    participation: float
    effective_rank: float
    correlation: float


def diversity(scores: Tensor, covariance: Tensor) -> Diversity:
    """The numbers from scores (C,) and covariance (C, C), of any float dtype."""
    scores, covariance = scores.double().cpu(), covariance.double().cpu()
    channels = len(scores)
    return Diversity(
        scores=tuple(scores.sort(descending=True).values.tolist()),
        alive=float((scores > ALIVE * scores.mean()).double().mean()),
        participation=float(scores.sum() ** 2 / (channels * scores.square().sum()).clamp(min=1e-300)),
        effective_rank=_effective_rank(covariance) / channels,
        correlation=_mean_correlation(covariance),
    )


def _effective_rank(covariance: Tensor) -> float:
    singular = torch.linalg.eigvalsh(covariance).clamp(min=0).sqrt()
    shares = singular / singular.sum().clamp(min=1e-300)
    return float(torch.special.entr(shares).sum().exp())


def _mean_correlation(covariance: Tensor) -> float:
    variance = covariance.diagonal()
    varies = variance > 1e-12 * variance.max()
    deviation = variance[varies].sqrt()
    correlation = (covariance[varies][:, varies] / torch.outer(deviation, deviation)).abs()
    channels = len(correlation)
    if channels < 2:
        return 0.0
    return float((correlation.sum() - channels) / (channels * (channels - 1)))


def last_mixer(network: Network) -> str:
    """The path of the spatial layer, or of the attention, in a network's last block. Raises ValueError without one."""
    *_, block = (None, *network.residual_blocks())
    for path, module in network.named_modules():
        name = next((name for name in MIXERS if module is block and hasattr(module, name)), None)
        if name:
            return f"{path}.{name}"
    raise ValueError(f"--module: the last block of this network has none of {', '.join(MIXERS)}; name the module")


def watch(network: nn.Module, path: str, statistics: ChannelStatistics) -> Any:
    """Add every output of the module at ``path`` to the statistics, until the returned handle is removed.

    Raises ValueError if there is no such module, or, when it runs, if its output is not one tensor.
    """
    try:
        module = network.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"--module {path}: {error}; an example for DiCo is stages.decoder1.0.conv") from None

    def add(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Residual):  # of a ConvModule, which leaves it to the next layer to add its branch
            output = output.branch
        if not isinstance(output, Tensor):
            raise ValueError(
                f"--module {path}: it returns a {type(output).__name__}; name a module inside it, or after it"
            )
        statistics.add(output)

    return module.register_forward_hook(add)
