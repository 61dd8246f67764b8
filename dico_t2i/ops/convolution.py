"""Fixed-kernel convolutions and re-sampling on (N, H, W, C) tensors.

torch's convolutions take (N, C, H, W); a channels-last view is passed to them without a copy.
"""

import torch.nn.functional as F
from torch import Tensor


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """x (N, H, W, C), weight (O, C / groups, 3, 3) -> (N, H, W, O); stride 1, zero padding 1."""
    return F.conv2d(_channels_last(x), weight, bias, padding=1, groups=groups).permute(0, 2, 3, 1)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (N, H, W, C), weight (C, 1, k, k) with k odd, bias (C,) -> (N, H, W, C); zero padding k // 2."""
    C, _, k, _ = weight.shape
    return F.conv2d(_channels_last(x), weight, bias, padding=k // 2, groups=C).permute(0, 2, 3, 1)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, backwards: bool = False) -> Tensor:
    """x (N, L, C), weight (C, 1, k), bias (C,) -> (N, L, C): tap k - 1 is the token itself, the others those before it.

    backwards: the tokens before it are those that follow.
    """
    C, _, k = weight.shape
    taps = (weight.flip(2) if backwards else weight)[:, :, None]
    padded = F.conv2d(_channels_last(x[:, None]), taps, bias, padding=(0, k - 1), groups=C)[:, :, 0].transpose(1, 2)
    return padded[:, k - 1 :] if backwards else padded[:, : x.shape[1]]


def _channels_last(x: Tensor) -> Tensor:
    """A channels-last view: (N, H, W, C) -> (N, C, H, W), without a copy."""
    # With N = 1 the stride of N is arbitrary, and torch would take some strides for a contiguous (N, C, H, W) tensor.
    return x.reshape(-1).view(x.shape).permute(0, 3, 1, 2)


def pixel_unshuffle(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, H/2, W/2, 4C); channel 4c + 2 dy + dx holds pixel (dy, dx) of channel c."""
    N, H, W, C = x.shape
    return x.reshape(N, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 5, 2, 4).reshape(N, H // 2, W // 2, 4 * C)


def pixel_shuffle(x: Tensor) -> Tensor:
    """The inverse of ``pixel_unshuffle``: (N, H, W, 4C) -> (N, 2H, 2W, C)."""
    N, H, W, C = x.shape
    return x.reshape(N, H, W, C // 4, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(N, 2 * H, 2 * W, C // 4)
