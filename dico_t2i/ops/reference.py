"""What each operator computes, in the plainest code. Slow; the tests hold the fast ones against it."""

import torch
from torch import Tensor


def text_dwconv(x: Tensor, context: Tensor) -> Tensor:
    """Each sample's 9x9 depthwise convolution with the kernels its text makes (paper, section 3.4).

    x (N, C, H, W), context (N, T, C) with T <= 81 -> (N, C, H, W). The last token repeats up to 81; token 9i + j
    is tap (i, j). Cross-correlation, stride 1, zero padding 4.
    """
    N, C, H, W = x.shape
    taps = torch.cat((context, context[:, -1:].expand(-1, 81 - context.shape[1], -1)), dim=1)
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    out = torch.zeros_like(x)
    for i in range(9):
        for j in range(9):
            out = out + padded[:, :, i : i + H, j : j + W] * taps[:, 9 * i + j].reshape(N, C, 1, 1)
    return out


def depthwise3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (N, H, W, C), weight (C, 1, 3, 3), bias (C,) -> (N, H, W, C); stride 1, zero padding 1."""
    H, W = x.shape[1:3]
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1))
    out = bias.expand_as(x)
    for i in range(3):
        for j in range(3):
            out = out + padded[:, i : i + H, j : j + W] * weight[:, 0, i, j]
    return out
