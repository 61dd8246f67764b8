"""Multiplies by a factor for each sample and channel, with or without adding a residual."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dico_t2i.ops.backend import backend
from dico_t2i.ops.operator import operator


def channel_scale(x: Tensor, scale: Tensor) -> Tensor:
    """x (N, H, W, C) times scale (N, C), in x's dtype. Raises ValueError for other shapes.

    Backward computes both gradients in one pass over memory.
    """
    _check(x, scale)
    return torch.ops.dico_t2i.scale(x, scale, None, None)


def channel_gate(x: Tensor, logits: Tensor) -> Tensor:
    """x (N, H, W, C) times the sigmoid of logits (N, C), in x's dtype. Raises ValueError for other shapes.

    Backward keeps the result, as does the linear layer that follows, and not x: the gradient of the logits is
    (1 - sigmoid) times the sum over pixels of the result times its gradient.
    """
    _check(x, logits)
    return _ChannelGate.apply(x, logits)


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor, branch_bias: Tensor | None = None) -> Tensor:
    """x + gate * branch in x's dtype; x and branch (N, H, W, C), gate (N, C). Backward keeps gate and branch.

    branch_bias (C,) is the bias that branch already contains: its gradient comes from here.
    """
    _check(x, gate, branch)
    return torch.ops.dico_t2i.scale(branch.to(x.dtype), gate, x, branch_bias)


def _check(x: Tensor, scale: Tensor, branch: Tensor | None = None) -> None:
    other = x if branch is None else branch
    if x.ndim != 4 or scale.shape != (x.shape[0], x.shape[3]) or other.shape != x.shape:
        raise ValueError(
            "a factor for each channel: (N, H, W, C) and (N, C) expected,"
            f" got {tuple(x.shape)}, {tuple(scale.shape)} and {tuple(other.shape)}"
        )


class _ChannelGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor) -> Tensor:
        factor = torch.sigmoid(logits)
        out = torch.ops.dico_t2i.scale(x, factor, None, None)
        ctx.save_for_backward(out, factor)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        out, factor = ctx.saved_tensors
        grad_x, total, _ = torch.ops.dico_t2i.scale_backward(out, factor, grad)
        return grad_x, total * (1 - factor)


@operator("scale")
def _scale(x: Tensor, scale: Tensor, base: Tensor | None, x_bias: Tensor | None) -> Tensor:
    """x_bias is used by the gradients alone."""
    return backend(x).scale_forward(x.contiguous(), scale, None if base is None else base.contiguous())


@operator("scale_backward")
def _scale_backward(x: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and scale, and the sum of ``grad`` over pixels (N, C) in float32 or more."""
    return backend(x).scale_backward(x.contiguous(), scale, grad.contiguous())


@_scale.register_fake
def _(x: Tensor, scale: Tensor, base: Tensor | None, x_bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@_scale_backward.register_fake
def _(x: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = scale.new_empty(scale.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), scale.new_empty(scale.shape), total


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, _, x_bias = inputs
    ctx.x_bias = None if x_bias is None else x_bias.dtype
    ctx.save_for_backward(x, scale)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, needs_scale, needs_base, _ = ctx.needs_input_grad
    x, scale = ctx.saved_tensors
    grad_base = grad if needs_base else None
    if not (needs_x or needs_scale):
        return None, None, grad_base, None
    grad_x, grad_scale, total = torch.ops.dico_t2i.scale_backward(x, scale, grad)
    return grad_x, grad_scale, grad_base, bias_gradient(ctx.x_bias, scale, total)


def bias_gradient(dtype: torch.dtype | None, gate: Tensor | None, total: Tensor | None) -> Tensor | None:
    """The gradient of the bias (C,) of a branch that is multiplied by a gate; None if dtype is.

    gate (N, C); total (N, C) is the sum over pixels of the gradient of the product.
    """
    return None if dtype is None or gate is None or total is None else (gate * total).sum(0).to(dtype)


_scale.register_autograd(_differentiate, setup_context=_keep)
