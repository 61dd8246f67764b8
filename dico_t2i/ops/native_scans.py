"""The recurrences of scans.c on CPU tensors."""

import torch
from torch import Tensor

from dico_t2i.ops.native import call
from dico_t2i.ops.plain_scans import SCAN_CHUNK

BLOCK = 128  # channels of which scans.c sums the gradients of B and C


def gla_forward(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    (N, L, H, V), K = v.shape, q.shape[-1]
    out, state = torch.empty(v.shape), torch.empty(N, H, K, V)
    call("gla_forward", *map(Tensor.float, (q, k, v, gates)), out, state, N, L, H, K, V)
    return out.to(v.dtype), state


def gla_backward(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, state: Tensor, grad: Tensor, grad_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (N, L, H, V), K = v.shape, q.shape[-1]
    likes = (q, k, v, gates)
    grads = [torch.empty(like.shape) for like in likes]
    call("gla_backward", *map(Tensor.float, (*likes, state, grad)), grad_state, *grads, N, L, H, K, V)
    return tuple(g.to(like.dtype) for g, like in zip(grads, likes, strict=True))  # type: ignore[return-value]


def scan_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor, backwards: bool
) -> tuple[Tensor, Tensor]:
    (N, L, E), n = u.shape, len(A)
    out, states = torch.empty(u.shape), torch.empty(N, -(-L // SCAN_CHUNK), n, E)
    inputs = map(Tensor.float, (u, delta, A, B, C, D, z, bias))
    call("scan_forward", *inputs, out, states, N, L, E, n, int(backwards))
    return out.to(u.dtype), states


def scan_backward(
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
) -> tuple[Tensor, ...]:
    (N, L, E), n = u.shape, len(A)
    grad_u, grad_delta, grad_z = (torch.empty(u.shape) for _ in range(3))
    grad_B, grad_C = (torch.empty(N, -(-E // BLOCK), L, n) for _ in range(2))
    grad_A, grad_D, grad_bias = torch.empty(N, n, E), torch.empty(N, E), torch.empty(N, E)
    inputs = map(Tensor.float, (u, delta, A, B, C, D, z, bias, states, grad))
    outputs = (grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias)
    call("scan_backward", *inputs, *outputs, N, L, E, n, int(backwards))
    sums = (grad_A.sum(0), grad_B.sum(1), grad_C.sum(1), grad_D.sum(0))
    return grad_u, grad_delta, *sums, grad_z, grad_bias.sum(0)
