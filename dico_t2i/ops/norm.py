"""LayerNorm over channels, fused with the operations around it in a block of DiCo: gate, residual, modulation."""

from typing import Any

import torch
from torch import Tensor

from dico_t2i.ops.backend import backend, present
from dico_t2i.ops.operator import operator
from dico_t2i.ops.scale import bias_gradient


def norm_modulate(x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """LayerNorm over C without weights (eps 1e-6), times 1 + scale, plus shift, in one pass over memory.

    x (N, H, W, C); shift and scale (N, C), both or none. Returns (N, H, W, C) in x's dtype; statistics are float32,
    or float64 if x is. Backward keeps x and two numbers for each pixel. Raises ValueError when the shapes do not fit.
    """
    check_norm(x, None, None, shift, scale)
    return torch.ops.dico_t2i.norm_modulate(x, shift, scale)[0]


def residual_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x + gate * branch, and its ``norm_modulate``, in one pass.

    x and branch (N, H, W, C); gate, shift and scale (N, C); without a gate it is 1. Returns two (N, H, W, C) in x's
    dtype. Backward keeps two numbers for each pixel, x and the branch, or without a gate the first result alone.
    branch_bias (C,) is the bias that branch already contains: with a gate its gradient comes from here.
    Raises ValueError when the shapes do not fit.
    """
    check_norm(x, branch, gate, shift, scale)
    inputs = (x, branch.to(x.dtype), gate, shift, scale, branch_bias)
    residual, normed, *_ = torch.ops.dico_t2i.residual_norm_modulate(*inputs)
    return residual, normed


def norm_gradients(
    kept: tuple[Tensor | None, ...], grad_residual: Tensor | None, grad_out: Tensor, again: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """The norm's output, if ``again``, and the gradients of x, branch and gate, a sum, and those of shift and scale.

    kept: source, mean, rstd, shift, scale, branch, gate, as in ``plain.norm_backward``. The sum is that of the gradient
    of x over pixels, (N, C) in float32 or more; it is there with a gate.
    """
    *_, scale, _, gate = kept
    grads: list[Tensor | None]
    grad_x, *grads, out = torch.ops.dico_t2i.norm_modulate_backward(*kept, grad_residual, grad_out, again)
    of_branch = grads[:3] if gate is not None else [grad_x, None, None]
    return out, [grad_x, *of_branch, *(grads[3:] if scale is not None else [None, None])]


def check_norm(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None
) -> None:
    """Raise ValueError if the shapes of ``residual_norm_modulate``'s inputs do not fit."""
    vectors = [v for v in (gate, shift, scale) if v is not None]
    if (
        x.ndim != 4
        or (branch is not None and branch.shape != x.shape)
        or any(v.shape != (x.shape[0], x.shape[3]) for v in vectors)
        or (shift is None) != (scale is None)
    ):
        shapes = [None if t is None else tuple(t.shape) for t in (x, branch, gate, shift, scale)]
        raise ValueError(
            "norm_modulate: expected x and branch (N, H, W, C), gate, shift and scale (N, C), with shift and scale both"
            f" given or both None; got {shapes}"
        )


@operator("norm_modulate")
def _norm(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    _, out, mean, rstd = backend(x).norm_forward(x.contiguous(), None, None, shift, scale)
    return out, mean, rstd


@operator("residual_norm_modulate")
def _residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    branch_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """branch_bias is used by the gradients alone."""
    return backend(x).norm_forward(x.contiguous(), branch.contiguous(), gate, shift, scale)


@operator("norm_modulate_backward")
def _norm_backward(
    source: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    grad_residual: Tensor | None,
    grad_out: Tensor,
    again: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``plain.norm_backward`` returns. Without a gate, the gradient of branch is that of x and left out."""
    branch, grad_residual = (None if t is None else t.contiguous() for t in (branch, grad_residual))
    kept = (source.contiguous(), mean, rstd, shift, scale, branch, gate)
    return present(*backend(source).norm_backward(*kept, grad_residual, grad_out.contiguous(), again))  # type: ignore[return-value]


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[:3], dtype=dtype), x.new_empty(x.shape[:3], dtype=dtype)


@_norm.register_fake
def _(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *_statistics(x)


@_residual_norm.register_fake
def _(x: Tensor, branch: Tensor, gate: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), x.new_empty(x.shape), *_statistics(x)


@_norm_backward.register_fake
def _(
    source: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift: Any,
    scale: Tensor | None,
    branch: Any,
    gate: Tensor | None,
    grad_residual: Any,
    grad_out: Any,
    again: bool,
) -> tuple[Tensor, ...]:
    likes = (source, None if gate is None else source, gate, gate, scale, scale, source if again else None)
    outputs = [None if like is None else like.new_empty(like.shape) for like in likes]
    if gate is not None:
        outputs[3] = gate.new_empty(gate.shape, dtype=mean.dtype)
    return present(*outputs)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shift, scale = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, rstd, shift, scale, None, None)


def _differentiate_norm(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    grads = norm_gradients(ctx.saved_tensors, None, grad, again=False)[1]
    return grads[0], *grads[4:]


def _keep_residual_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, gate, shift, scale, branch_bias = inputs
    residual, _, mean, rstd = output
    ctx.branch_bias = None if branch_bias is None else branch_bias.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    source, branch = (residual, None) if gate is None else (x, branch)
    ctx.save_for_backward(source, mean, rstd, shift, scale, branch, gate)


def _differentiate_residual_norm(
    ctx: Any, grad_residual: Tensor | None, grad: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    kept = ctx.saved_tensors
    source, *_, gate = kept
    if grad is None:
        grad = torch.zeros_like(source)
    grads = norm_gradients(kept, grad_residual, grad, again=False)[1]
    return *grads[:3], *grads[4:], bias_gradient(ctx.branch_bias, gate, grads[3])


_norm.register_autograd(_differentiate_norm, setup_context=_keep_norm)
_residual_norm.register_autograd(_differentiate_residual_norm, setup_context=_keep_residual_norm)
