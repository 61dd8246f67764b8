"""The blocks of DiCo. Tensors are (N, H, W, C) throughout: a pointwise convolution is a matrix product."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dico_t2i.models.conditioning import is_token, padding_bias
from dico_t2i.ops import (
    channel_scale,
    conv3x3,
    depthwise3x3_gelu_pool,
    gated_residual,
    norm_modulate,
    pixel_shuffle,
    pixel_unshuffle,
    residual_norm_modulate,
    text_dwconv,
)


class Conv3x3(nn.Module):
    """3x3 convolution with zero padding, on (N, H, W, C); ``groups=channels`` makes it depthwise."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True, groups: int = 1) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, 3, 3))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return conv3x3(x, self.weight, self.bias, self.groups)


class ConvModule(nn.Module):
    """1x1, depthwise 3x3, GELU, compact channel attention, 1x1 (paper, section 3.2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, channels)
        self.depthwise = Conv3x3(channels, channels, groups=channels)
        self.attention = nn.Linear(channels, channels)
        self.project = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        assert self.depthwise.bias is not None
        x, pooled = depthwise3x3_gelu_pool(self.expand(x), self.depthwise.weight, self.depthwise.bias)
        return self.project(channel_scale(x, torch.sigmoid(self.attention(pooled))))


class FeedForward(nn.Module):
    def __init__(self, channels: int, ratio: float, activation: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, int(ratio * channels))
        self.project = nn.Linear(int(ratio * channels), channels)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.activation(self.expand(x)))


class TextProjection(nn.Module):
    """The MLP that turns text tokens into kernels. Its last layer starts at zero, and so does the text's effect."""

    def __init__(self, text_dim: int, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(text_dim, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, text_dim) -> (N, T, C)."""
        return self.out(F.gelu(self.hidden(tokens)))


class TextKernel(NamedTuple):
    """All that a block's text branch makes of the tokens alone; the same at every timestep."""

    value: Tensor  # (N, T, C), or keys and values (N, T, 2C) of cross-attention


class TextConvolution(nn.Module):
    """Dynamic depthwise convolution by the text (paper, section 3.4), with kernels of size x size."""

    def __init__(self, projection: TextProjection | None, size: int = 9) -> None:
        super().__init__()
        self.projection = projection  # None: the stage has made the kernels
        self.size = size

    def kernel(self, text: Tensor) -> TextKernel:
        return TextKernel(text if self.projection is None else self.projection(text))

    def forward(self, x: Tensor, text: Tensor | TextKernel) -> Tensor:
        context = (text if isinstance(text, TextKernel) else self.kernel(text)).value
        return text_dwconv(x.permute(0, 3, 1, 2), context, self.size).permute(0, 2, 3, 1)


class CrossAttention(nn.Module):
    """Attention from every pixel to the text tokens, as in PixArt-alpha; the output starts at zero.

    masked: tokens of zeros are padding, and left out. Their keys and values are zeros too, which marks them in kernels.
    """

    def __init__(self, text_dim: int, channels: int, masked: bool = False) -> None:
        super().__init__()
        self.masked = masked
        self.head_dim = math.gcd(channels, 64)
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(text_dim, 2 * channels)
        self.out = nn.Linear(channels, channels)

    def kernel(self, text: Tensor) -> TextKernel:
        both = self.key_value(text)
        return TextKernel(both * is_token(text) if self.masked else both)

    def forward(self, x: Tensor, text: Tensor | TextKernel) -> Tensor:
        N, H, W, C = x.shape
        query = self.query(x).reshape(N, H * W, -1, self.head_dim).transpose(1, 2)
        both = (text if isinstance(text, TextKernel) else self.kernel(text)).value
        key, value = both.reshape(N, both.shape[1], 2, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        mask = padding_bias(both)[:, None, None] if self.masked else None
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(N, H, W, C))


class Block(nn.Module):
    """Convolution, text, feed-forward: three residual branches, the first and last under adaLN-Zero.

    mixer: what stands in for the ConvModule in an ablation (``mixers``).
    """

    def __init__(
        self,
        channels: int,
        ratio: float,
        text: nn.Module | None = None,
        mixer: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ) -> None:
        super().__init__()
        self.modulation = nn.Linear(channels, 6 * channels)
        self.conv = ConvModule(channels) if mixer is None else mixer
        self.text = text
        self.ffn = FeedForward(channels, ratio, activation)

    def forward(self, x: Tensor, condition: Tensor, text: Tensor | TextKernel | None = None) -> Tensor:
        """x (N, H, W, C), condition (N, C) after SiLU, text (N, T, dim) or its kernel -> (N, H, W, C)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        branch, gate = self.conv(norm_modulate(x, shift1, scale1)), gate1
        if self.text is not None:
            x, normed = residual_norm_modulate(x, branch, gate)
            branch, gate = self.text(normed, text), None
        x, normed = residual_norm_modulate(x, branch, gate, shift2, scale2)
        return gated_residual(x, gate2, self.ffn(normed))


class Downsample(nn.Module):
    """Half the resolution, twice the width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return pixel_unshuffle(self.conv(x))


class Upsample(nn.Module):
    """Twice the resolution, half the width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return pixel_shuffle(self.conv(x))


class Head(nn.Module):
    """Modulated norm and a 3x3 convolution to the output channels; starts at zero."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(channels, 2 * channels)
        self.out = Conv3x3(channels, out_channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.out(norm_modulate(x, *self.modulation(condition).chunk(2, dim=-1)))
