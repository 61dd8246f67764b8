"""What the rest of the system knows of a diffusion process, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

# x_t (N, C, H, W) and timesteps (N,) as the network knows them -> (N, C or 2C, H, W)
ModelFn = Callable[[Tensor, Tensor], Tensor]


class Process(Protocol):
    """A way from data to noise, and what the network learns about it.

    Timesteps run from data at 0 to noise at the config's ``diffusion.steps``, for every process.
    """

    def draw_timesteps(self, seed: int, position: Tensor) -> Tensor:
        """The timesteps at which the samples of these positions in the data order are trained, (N,) -> (N,)."""
        ...

    def training_losses(self, model_fn: ModelFn, x_start: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Losses of each sample, (N,): "loss", and its parts. x_start and noise (N, C, H, W), t (N,)."""
        ...


def full_precision(x: Tensor) -> Tensor:
    """x as float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def mean_per_sample(x: Tensor) -> Tensor:
    """(N, ...) -> (N,)."""
    return x.flatten(1).mean(dim=1)
