"""The middle of DiCo's ConvModule: depthwise 3x3 convolution, GELU, and the mean over pixels."""

from typing import Any

import torch
from torch import Tensor

from dico_t2i.ops.backend import backend
from dico_t2i.ops.operator import flop_formula, operator


def depthwise3x3_gelu_pool(
    x: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """GELU (exact) of a depthwise 3x3 convolution with zero padding, and its mean over pixels.

    x (N, H, W, C), weight (C, 1, 3, 3), bias (C,) -> (N, H, W, C) and (N, C), in x's dtype. Backward keeps
    only x and computes the convolution again. x_bias (C,) is the bias that x already contains: its gradient comes from
    here. Raises ValueError when the shapes do not fit.
    """
    C = x.shape[-1]
    if x.ndim != 4 or weight.shape != (C, 1, 3, 3) or bias.shape != (C,):
        raise ValueError(
            "depthwise3x3_gelu_pool: x (N, H, W, C), weight (C, 1, 3, 3) and bias (C,) expected,"
            f" got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    return torch.ops.dico_t2i.depthwise(x, weight, bias, x_bias)


@operator("depthwise")
def _depthwise(x: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x_bias is used by the gradients alone."""
    return backend(x).depthwise_forward(x.contiguous(), weight, bias)


@operator("depthwise_backward")
def _depthwise_backward(
    x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, grad_mean: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, and the sum of that of x over pixels (C,) in float32 or more."""
    grad_x, grad_weight, grad_bias, total = backend(x).depthwise_backward(
        x.contiguous(), weight, bias, grad.contiguous(), grad_mean
    )
    return grad_x, grad_weight.contiguous(), grad_bias, total


@_depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[3])


@_depthwise_backward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, grad_mean: Tensor) -> tuple[Tensor, ...]:
    total = bias.new_empty(bias.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape), total


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, x_bias = inputs
    ctx.x_bias = None if x_bias is None else x_bias.dtype
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor, grad_mean: Tensor) -> tuple[Tensor | None, ...]:
    *grads, total = torch.ops.dico_t2i.depthwise_backward(*ctx.saved_tensors, grad, grad_mean)
    return *grads, None if ctx.x_bias is None else total.to(ctx.x_bias)


_depthwise.register_autograd(_differentiate, setup_context=_keep)


@flop_formula(torch.ops.dico_t2i.depthwise)
def _flops(x_shape: tuple[int, ...], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * 9 * torch.Size(x_shape).numel()


@flop_formula(torch.ops.dico_t2i.depthwise_backward)
def _backward_flops(x_shape: tuple[int, ...], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """FLOPs of both gradients. As is usual, the recomputed convolution is not counted."""
    return 2 * _flops(x_shape)
