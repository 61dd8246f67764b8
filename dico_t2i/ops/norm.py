"""LayerNorm over channels, fused with the operations around it in a block of DiCo: gate, residual, modulation."""

from typing import Any

import torch
from torch import Tensor

from dico_t2i.ops.backend import backend, present


def norm_modulate(x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """LayerNorm over C without weights (eps 1e-6), times 1 + scale, plus shift, in one pass over memory.

    x (N, H, W, C); shift and scale (N, C), both or none. Returns (N, H, W, C) in x's dtype; statistics are float32,
    or float64 if x is. Backward keeps x and two numbers for each pixel. Raises ValueError when the shapes do not fit.
    """
    _check(x, None, None, shift, scale)
    return torch.ops.dico_t2i.norm_modulate(x, shift, scale)[0]


def residual_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor | None = None, shift: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x + gate * branch, and its ``norm_modulate``, in one pass.

    x and branch (N, H, W, C); gate, shift and scale (N, C); without a gate it is 1. Returns two (N, H, W, C) in x's
    dtype. Backward keeps the first of them, the branch if there is a gate, and two numbers for each pixel.
    Raises ValueError when the shapes do not fit.
    """
    _check(x, branch, gate, shift, scale)
    residual, normed, *_ = torch.ops.dico_t2i.residual_norm_modulate(x, branch.to(x.dtype), gate, shift, scale)
    return residual, normed


def _check(x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None) -> None:
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


@torch.library.custom_op("dico_t2i::norm_modulate", mutates_args=())
def _norm(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    _, out, mean, rstd = backend(x).norm_forward(x.contiguous(), None, None, shift, scale)
    return out, mean, rstd


@torch.library.custom_op("dico_t2i::residual_norm_modulate", mutates_args=())
def _residual_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backend(x).norm_forward(x.contiguous(), branch.contiguous(), gate, shift, scale)


@torch.library.custom_op("dico_t2i::norm_modulate_backward", mutates_args=())
def _norm_backward(
    residual: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    grad_residual: Tensor | None,
    grad_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, branch, gate, shift and scale. Without a gate, that of branch is that of x and left out."""
    branch, grad_residual = (None if t is None else t.contiguous() for t in (branch, grad_residual))
    grads = backend(residual).norm_backward(
        residual.contiguous(), mean, rstd, scale, branch, gate, grad_residual, grad_out.contiguous()
    )
    return present(*grads)  # type: ignore[return-value]


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[:3], dtype=dtype), x.new_empty(x.shape[:3], dtype=dtype)


@_norm.register_fake
def _(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *_statistics(x)


@_residual_norm.register_fake
def _(x: Tensor, branch: Tensor, gate: Tensor | None, shift: Any, scale: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), x.new_empty(x.shape), *_statistics(x)


@_norm_backward.register_fake
def _(
    residual: Tensor, mean: Any, rstd: Any, scale: Tensor | None, branch: Any, gate: Tensor | None, *grads: Any
) -> tuple[Tensor, ...]:
    likes = (residual, None if gate is None else residual, gate, scale, scale)
    return present(*(None if t is None else t.new_empty(t.shape) for t in likes))


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, scale = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, rstd, scale)


def _differentiate_norm(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x, mean, rstd, scale = ctx.saved_tensors
    if grad is None:
        return None, None, None
    grads = torch.ops.dico_t2i.norm_modulate_backward(x, mean, rstd, scale, None, None, None, grad)
    return (grads[0], None, None) if scale is None else (grads[0], grads[3], grads[4])


def _keep_residual_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, gate, _, scale = inputs
    residual, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(residual, mean, rstd, scale, None if gate is None else branch, gate)


def _differentiate_residual_norm(
    ctx: Any, grad_residual: Tensor | None, grad: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    residual, mean, rstd, scale, branch, gate = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(residual)
    grads = torch.ops.dico_t2i.norm_modulate_backward(residual, mean, rstd, scale, branch, gate, grad_residual, grad)
    grad_branch, grad_gate = (grads[0], None) if gate is None else grads[1:3]
    return grads[0], grad_branch, grad_gate, *((None, None) if scale is None else grads[3:])


_norm.register_autograd(_differentiate_norm, setup_context=_keep_norm)
_residual_norm.register_autograd(_differentiate_residual_norm, setup_context=_keep_residual_norm)
