"""Classifier-free guidance (Ho and Salimans 2022), in one convention: uncond + w (cond - uncond)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from dico_t2i.diffusion.process import ModelFn, full_precision


def guided(
    model_fn: Callable[..., Tensor],
    cond: Mapping[str, Tensor],
    null: Mapping[str, Tensor],
    scale: float,
    channels: Literal["all", "three"] = "all",
    interval: tuple[float, float] = (0.0, 1.0),
    steps: int = 1000,
) -> ModelFn:
    """The guided network as a function of x (N, C, H, W) and t (N,).

    ``model_fn(x, t, **conditioning)`` runs once on a batch of 2N, conditional half first; ``cond`` and
    ``null`` hold its conditioning tensors, each (N, ...). Guidance applies to the C prediction channels; the
    variance channels are the conditional ones. ``channels="three"`` guides channels 0..2 only, as the
    released code does. scale 1 is no guidance and runs the N conditional samples alone; so it goes for timesteps
    outside of ``interval``, bounds included, in fractions of ``steps`` (Kynkaanniemi et al. 2024): there, all of
    t must be the same time, as samplers have it. Results are float32 (or float64). Raises ValueError if the two
    conditionings do not match.
    """

    def conditional(x: Tensor, t: Tensor) -> Tensor:
        return full_precision(model_fn(x, t, **cond))

    if scale == 1:
        return conditional
    _check_alike(cond, null)
    both = {name: torch.cat((cond[name], null[name])) for name in cond}

    def guided_model(x: Tensor, t: Tensor) -> Tensor:
        output = full_precision(model_fn(torch.cat((x, x)), torch.cat((t, t)), **both))
        out_cond, out_null = output.chunk(2)
        guides = x.shape[1] if channels == "all" else 3
        base = out_null[:, :guides]
        return torch.cat((base + scale * (out_cond[:, :guides] - base), out_cond[:, guides:]), dim=1)

    def guided_inside(x: Tensor, t: Tensor) -> Tensor:
        inside = interval[0] * steps <= float(t[0]) <= interval[1] * steps
        return (guided_model if inside else conditional)(x, t)

    return guided_model if interval == (0, 1) else guided_inside


def _check_alike(cond: Mapping[str, Tensor], null: Mapping[str, Tensor]) -> None:
    shapes, null_shapes = ({name: tuple(x.shape) for name, x in c.items()} for c in (cond, null))
    if shapes != null_shapes:
        raise ValueError(f"guidance needs null conditioning of the same shapes: {null_shapes}, expected {shapes}")
