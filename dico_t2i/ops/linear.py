"""Linear layers and text convolutions together with the norm or the GELU before them.

The output of that norm or GELU is not kept for the backward pass. It is made again there, in the same pass over memory
as the gradient of its input, and then serves the gradient of the weights.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dico_t2i.ops.backend import backend, working_dtype
from dico_t2i.ops.norm import check_norm, norm_gradients
from dico_t2i.ops.operator import operator
from dico_t2i.ops.scale import bias_gradient


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x, or x + gate * branch if there is a branch, and a linear layer of its ``norm_modulate``.

    x and branch (N, H, W, C), weight (D, C), bias (D,), the others but branch_bias (N, C) -> (N, H, W, C) and
    (N, H, W, D). branch_bias is that of ``residual_norm_modulate``. Backward keeps what that one keeps, and the weight.
    Raises ValueError when the shapes of the norm's inputs do not fit.
    """
    check_norm(x, branch, gate, shift, scale)
    dtype = working_dtype(x)
    return _NormThen.apply(0, x, shift, scale, branch, gate, branch_bias, weight.to(dtype), bias.to(dtype))


def norm_text_dwconv(
    x: Tensor, branch: Tensor, gate: Tensor, context: Tensor, kernel: int, branch_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x + gate * branch, and ``text_dwconv`` of its norm, both (N, H, W, C); context (N, T, C), kernel odd.

    branch_bias is that of ``residual_norm_modulate``. Raises ValueError when x, branch and gate do not fit.
    """
    check_norm(x, branch, gate, None, None)
    return _NormThen.apply(kernel, x, None, None, branch, gate, branch_bias, context.to(working_dtype(x)), None)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None = None) -> Tensor:
    """A linear layer of GELU (exact): x (N, H, W, C), weight (D, C), bias (D,) -> (N, H, W, D). Backward keeps x.

    x_bias (C,) is the bias that x already contains: its gradient comes from here.
    """
    dtype = working_dtype(x)
    return _GeluLinear.apply(x, x_bias, weight.to(dtype), bias.to(dtype))


class _NormThen(torch.autograd.Function):
    """``kernel``: the side of a text convolution's kernels, whose tokens are ``weight``; 0 is a linear layer."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: int,
        x: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        branch: Tensor | None,
        gate: Tensor | None,
        branch_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if branch is None:
            normed, mean, rstd = torch.ops.dico_t2i.norm_modulate(x, shift, scale)
            residual = x.view_as(x)
        else:
            branch = branch.to(x.dtype)
            inputs = (x, branch, gate, shift, scale, None)
            residual, normed, mean, rstd = torch.ops.dico_t2i.residual_norm_modulate(*inputs)
        ctx.kernel, ctx.branch_bias = kernel, None if branch_bias is None else branch_bias.dtype
        source, branch = (residual, None) if gate is None else (x, branch)
        ctx.save_for_backward(source, mean, rstd, shift, scale, branch, gate, weight)
        ctx.set_materialize_grads(False)
        return residual, _applied(kernel, normed.to(weight.dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_residual: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        *kept, weight = ctx.saved_tensors
        *_, gate = kept
        _, _, _, _, needs_branch, _, _, needs_weight, needs_bias = ctx.needs_input_grad
        assert grad is not None
        normed, grads = norm_gradients(
            tuple(kept),
            grad_residual,
            _gradient_of_input(ctx.kernel, weight, grad),
            again=needs_weight,
        )
        grad_x, grad_branch, grad_gate, grad_sum, grad_shift, grad_scale = grads
        return (
            None,
            grad_x,
            grad_shift,
            grad_scale,
            grad_branch if needs_branch else None,
            grad_gate,
            bias_gradient(ctx.branch_bias, gate, grad_sum),
            _gradient_of_weight(ctx.kernel, normed.to(weight.dtype), weight, grad) if needs_weight else None,
            grad.flatten(0, -2).sum(0) if needs_bias else None,
        )


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, x_bias: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.x_bias = None if x_bias is None else x_bias.dtype
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x).to(weight.dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, needs_x_bias, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x, grad_sum, made = torch.ops.dico_t2i.gelu_backward(x, _gradient_of_input(0, weight, grad))
        return (
            grad_x,
            grad_sum.to(ctx.x_bias) if needs_x_bias else None,
            _gradient_of_weight(0, made.to(weight.dtype), weight, grad) if needs_weight else None,
            grad.flatten(0, -2).sum(0) if needs_bias else None,
        )


def _applied(kernel: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.dico_t2i.text_dwconv(x, weight, kernel) if kernel else F.linear(x, weight, bias)


def _gradient_of_input(kernel: int, weight: Tensor, grad: Tensor) -> Tensor:
    if kernel:
        return torch.ops.dico_t2i.text_dwconv_backward(None, weight, grad, kernel, True, False)[0]
    return (grad.flatten(0, -2) @ weight).unflatten(0, grad.shape[:-1])


def _gradient_of_weight(kernel: int, x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    if kernel:
        return torch.ops.dico_t2i.text_dwconv_backward(x, weight, grad, kernel, False, True)[1]
    return grad.flatten(0, -2).T @ x.flatten(0, -2)


@operator("gelu_backward")
def _gelu_backward(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return backend(x).gelu_backward(x.contiguous(), grad.contiguous())


@_gelu_backward.register_fake
def _(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), total, x.new_empty(x.shape)
