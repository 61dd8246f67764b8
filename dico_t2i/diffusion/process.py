"""The interface of all diffusion processes, and functions that they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

# x_t (N, C, H, W) and the network's timesteps (N,) -> (N, C or 2C, H, W)
ModelFn = Callable[[Tensor, Tensor], Tensor]


class Process(Protocol):
    """A diffusion process from data to noise, with its training loss.

    For every process timesteps run from 0, which is data, to the config's ``diffusion.steps``, which is noise.
    """

    def draw_timesteps(self, seed: int, position: Tensor) -> Tensor:
        """The timesteps at which the samples at these positions of the data order are trained, (N,) -> (N,)."""
        ...

    def training_losses(self, model_fn: ModelFn, x_start: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Losses of each sample, (N,): "loss" and its parts. x_start and noise (N, C, H, W), t (N,)."""
        ...


def full_precision(x: Tensor) -> Tensor:
    """x as float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def mean_per_sample(x: Tensor) -> Tensor:
    """The mean over all dimensions but the first: (N, ...) -> (N,)."""
    return x.flatten(1).mean(dim=1)
