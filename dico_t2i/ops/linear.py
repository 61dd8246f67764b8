"""Linear layers and text convolutions together with the norm, the GELU or the gate before them.

The output of that norm or GELU is not kept for the backward pass. It is made again there, in the same pass over memory
as the gradient of its input, and then serves the gradient of the weights. On a GPU of compute capability 9, GELU, the
gate and their gradients are made inside the products of layers that are narrow enough for memory to matter.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dico_t2i.ops.backend import backend, has_wide_products, working_dtype
from dico_t2i.ops.norm import check_norm, norm_gradients
from dico_t2i.ops.operator import flop_formula, operator
from dico_t2i.ops.scale import bias_gradient, channel_gate

WIDEST = 1024  # inputs of a layer; beyond, memory takes little of the time, and a product must be as fast as torch's
PIXELS = 128  # of a program of ours, which must be of one sample for a gate


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
    return _NormThen.apply(LINEAR, x, shift, scale, branch, gate, branch_bias, weight.to(dtype), bias.to(dtype))


def norm_linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``norm_linear`` returns, and GELU of the layer, through which no gradient flows, for ``gelu_linear``."""
    check_norm(x, branch, gate, shift, scale)
    dtype = working_dtype(x)
    return _NormThen.apply(GELU, x, shift, scale, branch, gate, branch_bias, weight.to(dtype), bias.to(dtype))


def norm_text_dwconv(
    x: Tensor, branch: Tensor, gate: Tensor, context: Tensor, kernel: int, branch_bias: Tensor | None = None
) -> Tensor:
    """The sum of x + gate * branch and ``text_dwconv`` of its norm, (N, H, W, C); context (N, T, C), kernel odd.

    branch_bias is that of ``residual_norm_modulate``. Raises ValueError when x, branch and gate do not fit.
    """
    check_norm(x, branch, gate, None, None)
    return _NormThen.apply(kernel, x, None, None, branch, gate, branch_bias, context.to(working_dtype(x)), None)[0]


def gelu_linear(
    x: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None = None, activated: Tensor | None = None
) -> Tensor:
    """A linear layer of GELU (exact): x (N, H, W, C), weight (D, C), bias (D,) -> (N, H, W, D). Backward keeps x.

    x_bias (C,) is the bias that x already contains: its gradient comes from here. activated: GELU of x, if it is known.
    """
    dtype = working_dtype(x)
    activated = F.gelu(x.detach()) if activated is None else activated
    return _GeluLinear.apply(x, x_bias, activated, weight.to(dtype), bias.to(dtype))


def gate_linear(x: Tensor, logits: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer of x times the sigmoid of logits: x (N, H, W, C), logits (N, C), weight (D, C) -> (N, H, W, D).

    Inside a product, backward keeps x, and otherwise what ``channel_gate`` keeps.
    """
    dtype = working_dtype(x)
    weight, bias = weight.to(dtype), bias.to(dtype)
    if not _fused(x, weight, max(weight.shape)) or x.shape[1] * x.shape[2] % PIXELS:
        return F.linear(channel_gate(x, logits), weight, bias)
    return _GateLinear.apply(x, logits, weight, bias)


LINEAR, GELU = 0, -1  # in place of a side: a linear layer; one of which GELU is wanted, too


class _NormThen(torch.autograd.Function):
    """``kernel``: the side of a text convolution's kernels, whose tokens are ``weight``, or LINEAR, or GELU."""

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
    ) -> tuple[Tensor, ...]:
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
        normed = normed.to(weight.dtype)
        if kernel > 0:
            return (torch.ops.dico_t2i.text_dwconv(normed, weight, kernel, residual),)
        if kernel == LINEAR:
            return residual, F.linear(normed, weight, bias)
        out, activated = _linear_gelu(normed, weight, bias)
        ctx.mark_non_differentiable(activated)
        return residual, out, activated

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_residual: Tensor | None, grad: Tensor | None = None, *_: None
    ) -> tuple[Tensor | None, ...]:
        grad = grad_residual if ctx.kernel > 0 else grad
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
    def forward(ctx: Any, x: Tensor, x_bias: Tensor | None, activated: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.x_bias = None if x_bias is None else x_bias.dtype
        ctx.save_for_backward(x, weight)
        return F.linear(activated.to(weight.dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, needs_x_bias, _, needs_weight, needs_bias = ctx.needs_input_grad
        if _fused(x, weight, grad.shape[-1]):
            grad_x, grad_sum, made = torch.ops.dico_t2i.gelu_linear_backward(x, weight, grad)
        else:
            grad_x, grad_sum, made = torch.ops.dico_t2i.gelu_backward(x, _gradient_of_input(LINEAR, weight, grad))
        return (
            grad_x,
            grad_sum.to(ctx.x_bias) if needs_x_bias else None,
            None,
            _gradient_of_weight(LINEAR, made.to(weight.dtype), weight, grad) if needs_weight else None,
            grad.flatten(0, -2).sum(0) if needs_bias else None,
        )


class _GateLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        factor = torch.sigmoid(logits)
        ctx.save_for_backward(x, factor, weight)
        return torch.ops.dico_t2i.gate_linear(x, factor, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factor, weight = ctx.saved_tensors
        _, _, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x, total, gated = torch.ops.dico_t2i.gate_linear_backward(x, factor, weight, grad)
        return (
            grad_x,
            total * factor * (1 - factor),
            _gradient_of_weight(LINEAR, gated, weight, grad) if needs_weight else None,
            grad.flatten(0, -2).sum(0) if needs_bias else None,
        )


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if _fused(x, weight, x.shape[-1]):
        return torch.ops.dico_t2i.linear_gelu(x, weight, bias)
    out = F.linear(x, weight, bias)
    return out, F.gelu(out)


def _fused(x: Tensor, weight: Tensor, inputs: int) -> bool:
    """Whether GELU becomes a part of the product: on a Hopper GPU, in bf16, with few inputs and loads of 16 bytes.

    The meta device, on which ``dico plan`` traces a step, stands for such a GPU.
    """
    aligned = all(size % 16 == 0 for size in weight.shape)
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16 or not aligned or inputs > WIDEST:
        return False
    return x.is_meta or (x.is_cuda and has_wide_products())


def _gradient_of_input(kernel: int, weight: Tensor, grad: Tensor) -> Tensor:
    if kernel > 0:
        return torch.ops.dico_t2i.text_dwconv_backward(None, weight, grad, kernel, True, False)[0]
    return (grad.flatten(0, -2) @ weight).unflatten(0, grad.shape[:-1])


def _gradient_of_weight(kernel: int, x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    if kernel > 0:
        return torch.ops.dico_t2i.text_dwconv_backward(x, weight, grad, kernel, False, True)[1]
    return grad.flatten(0, -2).T @ x.flatten(0, -2)


@operator("gelu_backward")
def _gelu_backward(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return backend(x).gelu_backward(x.contiguous(), grad.contiguous())


@_gelu_backward.register_fake
def _(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _gelu_backward_shapes(x)


def _gelu_backward_shapes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), total, x.new_empty(x.shape)


@operator("linear_gelu")
def _product_then_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A linear layer, and GELU of it."""
    return backend(x).linear_gelu_forward(x.contiguous(), weight.contiguous(), bias)


@operator("gelu_linear_backward")
def _product_then_gelu_backward(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What ``gelu_backward`` returns for x and grad @ weight."""
    return backend(x).gelu_linear_backward(x.contiguous(), weight.contiguous(), grad.contiguous())


@_product_then_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


@_product_then_gelu_backward.register_fake
def _(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _gelu_backward_shapes(x)


@operator("gate_linear")
def _gate_then_product(x: Tensor, factor: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return backend(x).gate_linear_forward(x.contiguous(), factor, weight.contiguous(), bias)


@operator("gate_linear_backward")
def _gate_then_product_backward(
    x: Tensor, factor: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and factor, and x times factor."""
    return backend(x).gate_linear_backward(x.contiguous(), factor, weight.contiguous(), grad.contiguous())


@_gate_then_product.register_fake
def _(x: Tensor, factor: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_gate_then_product_backward.register_fake
def _(x: Tensor, factor: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), factor.new_empty(factor.shape), x.new_empty(x.shape)


_OPERATORS = torch.ops.dico_t2i
# The operators that are matrix products, as torch.library knows them.
PRODUCTS = (
    *(_OPERATORS.linear_gelu, _OPERATORS.gelu_linear_backward),
    *(_OPERATORS.gate_linear, _OPERATORS.gate_linear_backward),
)


def _count(operator: Any, weight: int) -> None:
    """Count the products of an operator, whose argument of this number, from 0, is the weight, two-dimensional."""

    def flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
        return 2 * torch.Size(shapes[0]).numel() * shapes[weight][0]  # x has as many channels as the weight columns

    flop_formula(operator)(flops)


for _operator, _weight in zip(PRODUCTS, (1, 1, 2, 2), strict=True):
    _count(_operator, _weight)
