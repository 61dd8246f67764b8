"""Multiplies by a factor for each sample and channel, with or without adding a residual."""

from typing import Any

import torch
from torch import Tensor

from dico_t2i.ops.backend import backend


def channel_scale(x: Tensor, scale: Tensor) -> Tensor:
    """x (N, H, W, C) times scale (N, C), in x's dtype. Raises ValueError for other shapes.

    Backward computes both gradients in one pass over memory.
    """
    _check(x, scale)
    return torch.ops.dico_t2i.scale(x, scale, None)


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch in x's dtype; x and branch (N, H, W, C), gate (N, C). Backward keeps gate and branch."""
    _check(x, gate, branch)
    return torch.ops.dico_t2i.scale(branch.to(x.dtype), gate, x)


def _check(x: Tensor, scale: Tensor, branch: Tensor | None = None) -> None:
    other = x if branch is None else branch
    if x.ndim != 4 or scale.shape != (x.shape[0], x.shape[3]) or other.shape != x.shape:
        raise ValueError(
            "a factor for each channel: (N, H, W, C) and (N, C) expected,"
            f" got {tuple(x.shape)}, {tuple(scale.shape)} and {tuple(other.shape)}"
        )


@torch.library.custom_op("dico_t2i::scale", mutates_args=())
def _scale(x: Tensor, scale: Tensor, base: Tensor | None) -> Tensor:
    return backend(x).scale_forward(x.contiguous(), scale, None if base is None else base.contiguous())


@torch.library.custom_op("dico_t2i::scale_backward", mutates_args=())
def _scale_backward(x: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return backend(x).scale_backward(x.contiguous(), scale, grad.contiguous())


@_scale.register_fake
def _(x: Tensor, scale: Tensor, base: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@_scale_backward.register_fake
def _(x: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    grads = torch.ops.dico_t2i.scale_backward(*ctx.saved_tensors, grad) if any(needs[:2]) else (None, None)
    return *grads, grad if needs[2] else None


_scale.register_autograd(_differentiate, setup_context=_keep)
