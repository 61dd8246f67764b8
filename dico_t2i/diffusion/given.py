"""Sampling that begins with given images: image to image, and inpainting with a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

# Step k, its timestep and the latents after it -> the latents to continue with.
StepHook = Callable[[int, float, Tensor], Tensor]
Level = TypeVar("Level", int, float)


@dataclass(frozen=True)
class GivenLatents:
    """The latents of given images, and how far sampling may depart from them.

    latents: (N, C, H, W), or (1, C, H, W) for all samples, scaled as the network's input. strength, more than 0 and at
    most 1: sampling begins at this time, as a fraction of the process, with the latents noised to that time; 1 begins
    with noise alone. mask: (N or 1, 1, H, W) bool, true where the latents are made anew; elsewhere they are kept. None
    stands for true everywhere.
    """

    latents: Tensor
    strength: float = 1.0
    mask: Tensor | None = None


def begin(
    given: GivenLatents | None,
    noise: Tensor,
    levels: Sequence[Level],
    time_of: Callable[[Level], float],
    noised: Callable[[Level, Tensor, Tensor], Tensor],
    on_step: StepHook | None,
) -> tuple[list[Level], Tensor, StepHook | None]:
    """The noise levels to sample at, the latents to begin with, and the hook to call after each step.

    levels: all levels of the sampler, from noise to data. time_of: a level's time as a fraction of the process, 1 for
    noise. noised(level, latents, noise): the latents with the noise of a level. Raises ValueError if the strength
    leaves no step.
    """
    if given is None:
        return list(levels), noise, on_step
    left = [level for level in levels if time_of(level) <= given.strength + 1e-9]
    if not left:
        raise ValueError(f"strength: {given.strength:g} leaves none of the {len(levels)} steps; raise it, or the steps")
    clean = given.latents.to(noise)
    first = noised(left[0], clean, noise)
    x = noise if given.strength == 1 else first.expand_as(noise)
    if given.mask is None:
        return left, x, on_step
    mask = given.mask

    def keep(k: int, t: float, x: Tensor) -> Tensor:
        x = torch.where(mask, x, noised(left[k + 1], clean, noise) if k + 1 < len(left) else clean)
        return on_step(k, t, x) if on_step else x

    return left, torch.where(mask, x, first), keep
