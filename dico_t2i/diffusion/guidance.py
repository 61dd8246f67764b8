"""Classifier-free guidance (Ho and Salimans 2022): uncond + w (cond - uncond)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from dico_t2i.diffusion.process import ModelFn, full_precision


def guided(
    model_fn: Callable[..., Tensor],
    cond: Mapping[str, Any],
    null: Mapping[str, Any],
    scale: float,
    channels: Literal["all", "three"] = "all",
    interval: tuple[float, float] = (0.0, 1.0),
    steps: int = 1000,
    wrap: Callable[[ModelFn], ModelFn] = lambda network: network,
) -> ModelFn:
    """The guided network as a function of x (N, C, H, W) and t (N,).

    ``model_fn(x, t, **conditioning)`` runs once on a batch of 2N, the conditional half first. ``cond`` and ``null``
    hold its conditioning: tensors (N, ...), or nested tuples and dicts of them. Those of ``null`` may be (1, ...),
    which is used for all samples. Guidance applies to the C prediction channels; the variance channels are the
    conditional ones. ``channels="three"`` guides only channels 0..2, as the released code does. scale 1 means no
    guidance and runs only the N conditional samples. The same happens at timesteps outside of ``interval``, which
    includes its bounds and is given in fractions of ``steps`` (Kynkaanniemi et al. 2024); with an interval all of t
    must be equal. ``wrap`` is applied to each function of x and t that is called. Results are float32 (or float64).
    Raises ValueError if the two conditionings do not match.
    """

    def conditional(x: Tensor, t: Tensor) -> Tensor:
        return full_precision(model_fn(x, t, **cond))

    if scale == 1:
        return wrap(conditional)
    _check_alike(dict(cond), dict(null))
    both = tree_map(lambda c, u: torch.cat((c, u.expand(len(c), *u.shape[1:]))), dict(cond), dict(null))

    def guided_model(x: Tensor, t: Tensor) -> Tensor:
        output = full_precision(model_fn(torch.cat((x, x)), torch.cat((t, t)), **both))
        out_cond, out_null = output.chunk(2)
        guides = x.shape[1] if channels == "all" else 3
        base = out_null[:, :guides]
        return torch.cat((base + scale * (out_cond[:, :guides] - base), out_cond[:, guides:]), dim=1)

    inside = wrap(guided_model)
    if interval == (0, 1):
        return inside
    outside = wrap(conditional)

    def guided_within(x: Tensor, t: Tensor) -> Tensor:
        return (inside if interval[0] * steps <= float(t[0]) <= interval[1] * steps else outside)(x, t)

    return guided_within


def _check_alike(cond: dict[str, Any], null: dict[str, Any]) -> None:
    (values, form), (null_values, null_form) = tree_flatten(cond), tree_flatten(null)
    fit = form == null_form and all(
        c.shape[1:] == u.shape[1:] and len(u) in (1, len(c)) for c, u in zip(values, null_values, strict=True)
    )
    if not fit:
        shapes, null_shapes = (tree_map_only(Tensor, lambda x: tuple(x.shape), c) for c in (cond, null))
        raise ValueError(f"guidance needs null conditioning of the same shapes: got {null_shapes}, expected {shapes}")
