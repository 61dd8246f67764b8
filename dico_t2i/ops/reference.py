"""Each operator in the plainest code. It is slow and serves the tests, which compare the fast versions with it."""

import math

import torch
from torch import Tensor


def text_dwconv(x: Tensor, context: Tensor, kernel: int = 9) -> Tensor:
    """A k x k depthwise convolution with kernels made from each sample's text (paper, section 3.4, with k = 9).

    x (N, C, H, W), context (N, T, C) with T <= k * k, k odd -> (N, C, H, W). The last token is repeated up to k * k
    tokens; token k * i + j is tap (i, j). Cross-correlation, stride 1, zero padding k // 2.
    """
    N, C, H, W = x.shape
    taps = torch.cat((context, context[:, -1:].expand(-1, kernel**2 - context.shape[1], -1)), dim=1)
    padded = torch.nn.functional.pad(x, (kernel // 2,) * 4)
    out = torch.zeros_like(x)
    for i in range(kernel):
        for j in range(kernel):
            out = out + padded[:, :, i : i + H, j : j + W] * taps[:, kernel * i + j].reshape(N, C, 1, 1)
    return out


def depthwise3x3_gelu_pool(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, H, W, C), weight (C, 1, 3, 3), bias (C,) -> (N, H, W, C) and (N, C); stride 1, zero padding 1."""
    H, W = x.shape[1:3]
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1))
    before = bias.expand_as(x)
    for i in range(3):
        for j in range(3):
            before = before + padded[:, i : i + H, j : j + W] * weight[:, 0, i, j]
    out = before * 0.5 * (1 + torch.erf(before / math.sqrt(2)))
    return out, out.sum((1, 2)) / (H * W)


def norm_modulate(x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x (N, H, W, C), shift and scale (N, C) -> (N, H, W, C)."""
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = centred.square().sum(-1, keepdim=True) / x.shape[-1]
    normed = centred / torch.sqrt(variance + 1e-6)
    return normed if shift is None or scale is None else normed * (1 + scale[:, None, None]) + shift[:, None, None]


def residual_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor | None = None, shift: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x and branch (N, H, W, C), all others (N, C) -> two (N, H, W, C)."""
    residual = x + branch if gate is None else gated_residual(x, gate, branch)
    return residual, norm_modulate(residual, shift, scale)


def channel_scale(x: Tensor, scale: Tensor) -> Tensor:
    """x (N, H, W, C), scale (N, C) -> (N, H, W, C)."""
    return x * scale[:, None, None]


def channel_gate(x: Tensor, logits: Tensor) -> Tensor:
    """x (N, H, W, C), logits (N, C) -> (N, H, W, C)."""
    return channel_scale(x, 1 / (1 + torch.exp(-logits)))


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x and branch (N, H, W, C), weight (D, C), bias (D,), all others (N, C) -> (N, H, W, C) and (N, H, W, D)."""
    residual = x if branch is None else residual_norm_modulate(x, branch, gate)[0]
    return residual, norm_modulate(residual, shift, scale) @ weight.T + bias


def norm_text_dwconv(x: Tensor, branch: Tensor, gate: Tensor, context: Tensor, kernel: int) -> Tensor:
    """x and branch (N, H, W, C), gate (N, C), context (N, T, C) -> (N, H, W, C)."""
    residual, normed = residual_norm_modulate(x, branch, gate)
    return residual + text_dwconv(normed.permute(0, 3, 1, 2), context, kernel).permute(0, 2, 3, 1)


def gate_linear(x: Tensor, logits: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (N, H, W, C), logits (N, C), weight (D, C), bias (D,) -> (N, H, W, D)."""
    return channel_gate(x, logits) @ weight.T + bias


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (N, H, W, C), weight (D, C), bias (D,) -> (N, H, W, D)."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2))) @ weight.T + bias


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x and branch (N, H, W, C), gate (N, C) -> (N, H, W, C)."""
    return x + gate[:, None, None] * branch


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """q, k and gates (N, L, H, K), v (N, L, H, V) -> (N, L, H, V) and the last state (N, H, K, V)."""
    (N, L, H, V), K = v.shape, q.shape[-1]
    state, out = v.new_zeros(N, H, K, V), []
    for t in range(L):
        state = gates[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        out.append((state * q[:, t, :, :, None]).sum(2) / math.sqrt(K))
    return torch.stack(out, 1), state


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
    """u, delta and z (N, L, E), A (E, n), B and C (N, L, n), D and delta_bias (E,) -> (N, L, E)."""
    N, L, E = u.shape
    state, out = u.new_zeros(N, E, A.shape[1]), [u] * L
    for t in reversed(range(L)) if backwards else range(L):
        dt = torch.log1p(torch.exp(delta[:, t] + delta_bias))
        state = torch.exp(dt[..., None] * A) * state + (dt * u[:, t])[..., None] * B[:, t, None]
        y = (state * C[:, t, None]).sum(2) + D * u[:, t]
        out[t] = y * z[:, t] * torch.sigmoid(z[:, t])
    return torch.stack(out, 1)
