"""The selective scan of Mamba: a linear recurrence in every channel, whose steps and couplings each token chooses."""

from typing import Any

import torch
from torch import Tensor

from dico_t2i.ops.backend import scan_backend
from dico_t2i.ops.operator import flop_formula, operator
from dico_t2i.ops.plain_scans import SCAN_CHUNK


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    backwards: bool = False,
) -> Tensor:
    """y * silu(z) with h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t, y_t = C_t h_t + D u_t, dt = softplus(delta +
    delta_bias), h_0 = 0, channel by channel (Mamba, Gu and Dao 2023, algorithm 2; B by Euler's rule).

    u, delta and z (N, L, E); A (E, n), negative; B and C (N, L, n), shared by the channels; D and delta_bias (E,).
    backwards: the last token is the first one of the recurrence. Returns (N, L, E) in u's dtype; sums are in float32,
    or float64 if u is. Differentiable once in all tensors; backward keeps them, and the state before each SCAN_CHUNK
    tokens. Raises ValueError when the shapes do not fit.
    """
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    N, L, E, n = *u.shape, A.shape[-1]
    wanted = {"u": (N, L, E), "delta": (N, L, E), "A": (E, n), "B": (N, L, n), "C": (N, L, n), "D": (E,)}
    wanted |= {"z": (N, L, E), "delta_bias": (E,)}
    wrong = [f"{name} {tuple(t.shape)}" for name, t in tensors.items() if tuple(t.shape) != wanted[name]]
    if wrong:
        raise ValueError(
            "selective_scan: u, delta and z (N, L, E), A (E, n), B and C (N, L, n), D and delta_bias (E,) expected;"
            f" beside u {tuple(u.shape)} there is {', '.join(wrong)}"
        )
    return torch.ops.dico_t2i.selective_scan(*tensors.values(), backwards)[0]


@operator("selective_scan")
def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor, backwards: bool
) -> tuple[Tensor, Tensor]:
    """The output, and the states before each chunk (N, chunks, n, E)."""
    inputs = (tensor.contiguous() for tensor in (u, delta, A.T, B, C, D, z, bias))
    return scan_backend(u).scan_forward(*inputs, backwards)


@operator("selective_scan_backward")
def _scan_backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    bias: Tensor,
    states: Tensor,
    grad: Tensor,
    backwards: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the eight tensors, in their order."""
    inputs = (tensor.contiguous() for tensor in (u, delta, A.T, B, C, D, z, bias, states, grad))
    grads = scan_backend(u).scan_backward(*inputs, backwards)
    likes = (u, delta, A.T, B, C, D, z, bias)
    u, delta, A, B, C, D, z, bias = (g.to(like.dtype) for g, like in zip(grads, likes, strict=True))
    return u, delta, A.T.contiguous(), B, C, D, z, bias


@_scan.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    N, L, E = u.shape
    states = (N, -(-L // SCAN_CHUNK), A.shape[1], E)
    return u.new_empty(u.shape), u.new_empty(states, dtype=torch.promote_types(u.dtype, torch.float32))


@_scan_backward.register_fake
def _(*tensors: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors[:8])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backwards = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *torch.ops.dico_t2i.selective_scan_backward(*ctx.saved_tensors, grad, ctx.backwards), None


_scan.register_autograd(_differentiate, setup_context=_keep)


@flop_formula(torch.ops.dico_t2i.selective_scan)
def _flops(u_shape: tuple[int, ...], delta_shape: Any, A_shape: tuple[int, ...], *_: Any, out_shape: Any = None) -> int:
    """Each number of a state fades, is added to, and is read, once a token; all else is elementwise."""
    return 2 * 3 * torch.Size(u_shape).numel() * A_shape[-1]


@flop_formula(torch.ops.dico_t2i.selective_scan_backward)
def _backward_flops(u_shape: Any, delta_shape: Any, A_shape: Any, *_: Any, out_shape: Any = None) -> int:
    return 2 * _flops(u_shape, delta_shape, A_shape)
