"""The blocks of DiCo. All tensors are (N, H, W, C), so that a pointwise convolution is a matrix product."""

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dico_t2i.models.conditioning import Text, apply_linear, is_token, padding_bias, reachable
from dico_t2i.ops import (
    channel_gate,
    conv3x3,
    depthwise3x3_gelu_pool,
    gate_linear,
    gated_residual,
    gelu_linear,
    norm_linear,
    norm_linear_gelu,
    norm_modulate,
    norm_text_dwconv,
    pixel_shuffle,
    pixel_unshuffle,
    residual_norm_modulate,
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


class Residual(NamedTuple):
    """A residual stream and what is to be added to it: x + gate * branch, (N, H, W, C) and (N, C); no gate means 1.

    bias (C,) is that of the layer that made the branch, if its gradient is still to be computed.
    """

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None
    bias: Tensor | None = None

    def norm(self, shift: Tensor | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sum, and its ``norm_modulate``."""
        if self.branch is None:
            return self.x, norm_modulate(self.x, shift, scale)
        return residual_norm_modulate(self.x, self.branch, self.gate, shift, scale, self.bias)

    def linear(self, layer: nn.Linear, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The sum, a layer of its ``norm_modulate``, and the layer's bias.

        The operator that takes the layer's result must give the bias its gradient. That gradient is the sum of the
        result's gradient over pixels, so the operator that computes the one has the other at no cost. A layer with an
        adapter keeps its bias to itself: None.
        """
        if type(layer) is not nn.Linear:
            x, normed = self.norm(shift, scale)
            return x, layer(normed), None
        parameters = (layer.weight, layer.bias.detach(), shift, scale)
        return *norm_linear(self.x, *parameters, self.branch, self.gate, self.bias), layer.bias


class ConvModule(nn.Module):
    """1x1, depthwise 3x3, GELU, compact channel attention, 1x1 (paper, section 3.2), of a norm of the residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, channels)
        self.depthwise = Conv3x3(channels, channels, groups=channels)
        self.attention = nn.Linear(channels, channels)
        self.project = nn.Linear(channels, channels)

    def forward(self, residual: Residual, shift: Tensor, scale: Tensor, gate: Tensor) -> Residual:
        assert self.depthwise.bias is not None
        x, hidden, bias = residual.linear(self.expand, shift, scale)
        hidden, pooled = depthwise3x3_gelu_pool(hidden, self.depthwise.weight, self.depthwise.bias, bias)
        logits, layer = self.attention(pooled), self.project
        if type(layer) is not nn.Linear:
            return Residual(x, layer(channel_gate(hidden, logits)), gate)
        return Residual(x, gate_linear(hidden, logits, layer.weight, layer.bias.detach()), gate, layer.bias)


class FeedForward(nn.Module):
    """Two linear layers with an activation between them; ``ratio`` is the hidden width over the channels."""

    def __init__(self, channels: int, ratio: float, activation: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, int(ratio * channels))
        self.project = nn.Linear(int(ratio * channels), channels)
        self.activation = activation

    def forward(self, residual: Residual, shift: Tensor, scale: Tensor, gate: Tensor) -> Residual:
        if self.activation is not F.gelu or not type(self.expand) is type(self.project) is nn.Linear:
            x, normed = residual.norm(shift, scale)
            return Residual(x, self.project(self.activation(self.expand(normed))), gate)
        before, branch, before_gate, bias = residual
        parameters = (self.expand.weight, self.expand.bias.detach(), shift, scale)
        x, hidden, activated = norm_linear_gelu(before, *parameters, branch, before_gate, bias)
        project = (self.project.weight, self.project.bias.detach())
        branch = gelu_linear(hidden, *project, self.expand.bias, activated)
        return Residual(x, branch, gate, self.project.bias)


class TextProjection(nn.Module):
    """The MLP that turns text tokens into kernels. Its last layer starts at zero, so text has no effect at first."""

    def __init__(self, text_dim: int, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(text_dim, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, text: Text) -> Tensor:
        """Tokens (N, T, text_dim) -> (N, T, C), and the shape (N, k, k, text_dim) of ``reachable`` -> (N, k, k, C)."""
        hidden = apply_linear(self.hidden, text)
        return (
            gelu_linear(hidden, self.out.weight, self.out.bias)
            if type(self.out) is nn.Linear
            else self.out(F.gelu(hidden))
        )


class TextKernel(NamedTuple):
    """The part of a block's text branch that depends only on the tokens and is the same at every timestep."""

    value: Tensor  # (N, T, C), or (N, k, k, C) of ``reachable``, or the keys and values (N, T, 2C) of cross-attention


class TextConvolution(nn.Module):
    """Dynamic depthwise convolution with kernels made from the text (paper, section 3.4), each size x size."""

    def __init__(self, projection: TextProjection | None, size: int = 9) -> None:
        super().__init__()
        self.projection = projection  # None: the stage makes the kernels
        self.size = size

    def kernel(self, text: Text) -> TextKernel:
        return TextKernel(cast(Tensor, text) if self.projection is None else self.projection(text))

    def forward(self, residual: Residual, text: Text | TextKernel) -> Residual:
        x, branch, gate, bias = residual
        assert branch is not None
        assert gate is not None
        if isinstance(text, TextKernel):
            taps = reachable(text.value, self.size, x.shape[1:3])
        else:
            taps = self.kernel(reachable(text, self.size, x.shape[1:3])).value
        size = self.size if taps.ndim == 3 else taps.shape[1]
        return Residual(norm_text_dwconv(x, branch, gate, taps.flatten(1, -2), size, bias))


class CrossAttention(nn.Module):
    """Attention from every pixel to the text tokens, as in PixArt-alpha; its output starts at zero.

    masked: tokens of zeros are padding and get no attention. Their keys and values are set to zero as well, which marks
    them as padding in a TextKernel.
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
    """Three residual branches: convolution, text and feed-forward; the first and last have adaLN-Zero.

    mixer: the layer that replaces the ConvModule in an ablation (see ``mixers``).
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

    def forward(self, x: Tensor, condition: Tensor, text: Text | TextKernel | None = None) -> Tensor:
        """x (N, H, W, C), condition (N, C) after SiLU, text (N, T, dim) or a TextKernel -> (N, H, W, C)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        residual = self._mix(Residual(x), shift1, scale1, gate1)
        if self.text is not None:
            residual = self._add_text(residual, text)
        x, branch, gate, bias = self.ffn(residual, shift2, scale2, gate2)
        return gated_residual(x, gate, branch, bias)

    def _mix(self, residual: Residual, shift: Tensor, scale: Tensor, gate: Tensor) -> Residual:
        if isinstance(self.conv, ConvModule):
            return self.conv(residual, shift, scale, gate)
        x, normed = residual.norm(shift, scale)
        return Residual(x, self.conv(normed), gate)

    def _add_text(self, residual: Residual, text: Text | TextKernel | None) -> Residual:
        assert self.text is not None
        if isinstance(self.text, TextConvolution):
            return self.text(residual, text)
        x, normed = residual.norm()
        return Residual(x, self.text(normed, text))


class Downsample(nn.Module):
    """Halves the resolution and doubles the width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return pixel_unshuffle(self.conv(x))


class Upsample(nn.Module):
    """Doubles the resolution and halves the width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return pixel_shuffle(self.conv(x))


class Head(nn.Module):
    """A modulated norm and a 3x3 convolution to the output channels; its output starts at zero."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(channels, 2 * channels)
        self.out = Conv3x3(channels, out_channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.out(norm_modulate(x, *self.modulation(condition).chunk(2, dim=-1)))
