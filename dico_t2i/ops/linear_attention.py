"""Gated linear attention: attention whose keys and values are summed in a state that the gates let fade."""

from typing import Any

import torch
from torch import Tensor

from dico_t2i.ops.backend import present, scan_backend
from dico_t2i.ops.operator import flop_formula, operator


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """o_t = S_t^T q_t / sqrt(K) with S_t = diag(exp gates_t) S_(t-1) + k_t v_t^T, S_0 = 0, head by head (GLA, Yang et
    al. 2024, equation 3).

    q, k and gates (N, L, H, K), the gates being logarithms of at most 0, however far below; v (N, L, H, V). Returns o
    (N, L, H, V) in v's dtype and the last state (N, H, K, V) in float32, or float64 if v is; both are differentiable
    once in all inputs. Sums are in float32; backward keeps the inputs and the last state. Raises ValueError when the
    shapes do not fit.
    """
    if q.ndim != 4 or k.shape != q.shape or gates.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            "gated_linear_attention: q, k and gates (N, L, H, K) and v (N, L, H, V) expected, got"
            f" {tuple(q.shape)}, {tuple(k.shape)}, {tuple(gates.shape)} and {tuple(v.shape)}"
        )
    return torch.ops.dico_t2i.gated_linear_attention(q, k, v, gates)


@operator("gated_linear_attention")
def _gla(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    return scan_backend(v).gla_forward(*(tensor.contiguous() for tensor in (q, k, v, gates)))


@operator("gated_linear_attention_backward")
def _gla_backward(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, state: Tensor, grad: Tensor, grad_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_state = None if grad_state is None else grad_state.contiguous()
    inputs = (tensor.contiguous() for tensor in (q, k, v, gates, state, grad))
    return scan_backend(v).gla_backward(*inputs, grad_state)


@_gla.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    N, _, H, V = v.shape
    return v.new_empty(v.shape), v.new_empty((N, H, q.shape[-1], V), dtype=torch.promote_types(v.dtype, torch.float32))


@_gla_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return present(*(tensor.new_empty(tensor.shape) for tensor in (q, k, v, gates)))


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx: Any, grad: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None and grad_state is None:
        return None, None, None, None
    grad = torch.zeros_like(ctx.saved_tensors[2]) if grad is None else grad
    return torch.ops.dico_t2i.gated_linear_attention_backward(*ctx.saved_tensors, grad, grad_state)


_gla.register_autograd(_differentiate, setup_context=_keep)


@flop_formula(torch.ops.dico_t2i.gated_linear_attention)
def _flops(q_shape: tuple[int, ...], k_shape: Any, v_shape: tuple[int, ...], *_: Any, out_shape: Any = None) -> int:
    """As a recurrence: each number of a state is multiplied by its gate, added to, and read, once a token."""
    return 2 * 3 * torch.Size(q_shape).numel() * v_shape[-1]


@flop_formula(torch.ops.dico_t2i.gated_linear_attention_backward)
def _backward_flops(q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, out_shape: Any = None) -> int:
    return 2 * _flops(q_shape, k_shape, v_shape)
