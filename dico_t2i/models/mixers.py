"""The layers that replace the ConvModule, or a part of it, in the paper's ablations (section 6).

All take and return (N, H, W, C). Attention has heads of 64 channels, or of the largest power of two that divides the
width. The paper names the methods without details; each class states where it differs from its source.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dico_t2i.config import DiCoConfig
from dico_t2i.models.conditioning import sinusoid
from dico_t2i.ops import channel_scale, depthwise_conv

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}
WINDOW = 8
FOCUS = 3  # exponent in focused linear attention
AGENTS = 7  # agent attention has this many rows and columns of agents
REDUCTION = 16  # factor by which squeeze-and-excitation reduces the channels


def ablated_mixer(config: DiCoConfig, channels: int, number: int) -> nn.Module | None:
    """The mixer of block ``number`` of a stage; None stands for DiCo's ConvModule."""
    match config.mixer:
        case "attention":
            return SelfAttention(channels)
        case "window":
            return WindowAttention(channels, shifted=number % 2 == 1)
        case "focused_linear":
            return FocusedLinearAttention(channels)
        case "agent":
            return AgentAttention(channels)
    if (config.channel_attention, config.depthwise_kernel, config.activation) == ("compact", 3, "gelu"):
        return None
    return ConvVariant(
        channels,
        CHANNEL_ATTENTIONS[config.channel_attention](channels),
        config.depthwise_kernel,
        ACTIVATIONS[config.activation],
    )


# ---- Variants of the ConvModule ----


class Depthwise(nn.Module):
    """Depthwise convolution with zero padding; ``kernel`` must be odd."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv(x, self.weight, self.bias)


class ConvVariant(nn.Module):
    """1x1, depthwise convolution, activation, channel attention, 1x1; its parameters are named as in ConvModule."""

    def __init__(
        self, channels: int, attention: nn.Module, kernel: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, channels)
        self.depthwise = Depthwise(channels, kernel)
        self.attention = attention
        self.project = nn.Linear(channels, channels)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.attention(self.activation(self.depthwise(self.expand(x)))))


class CompactAttention(nn.Linear):
    """DiCo's channel attention: each channel times the sigmoid of a linear map of the means of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return channel_scale(x, torch.sigmoid(super().forward(x.mean((1, 2)))))


class SqueezeExcitation(nn.Module):
    """Channel attention through a bottleneck of two layers (Hu et al., arXiv 1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, max(1, channels // REDUCTION))
        self.excite = nn.Linear(max(1, channels // REDUCTION), channels)

    def forward(self, x: Tensor) -> Tensor:
        return channel_scale(x, torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((1, 2)))))))


class ChannelSelfAttention(nn.Module):
    """Attention from channels to channels: the sum over j of softmax_j(temperature <q_i, k_j>) v_j.

    q_i, k_j and v_j are channels of the image; q_i and k_j are normalised over the pixels (Restormer, Zamir et al.,
    arXiv 2111.09881). It has one head. The convolution and the last projection of the original are left to the
    ConvModule.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.log_temperature = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).flatten(1, 2).chunk(3, dim=-1)  # (N, pixels, C)
        query = F.normalize(query, dim=1) * self.log_temperature.exp().to(x.dtype)
        weights = (query.transpose(1, 2) @ F.normalize(key, dim=1)).softmax(dim=-1)
        return (value @ weights.transpose(1, 2)).reshape(x.shape)


CHANNEL_ATTENTIONS: dict[str, Callable[[int], nn.Module]] = {
    "compact": CompactAttention,
    "se": SqueezeExcitation,
    "self": ChannelSelfAttention,
    "none": nn.Identity,
}


# ---- Replacements of the whole ConvModule ----


class SelfAttention(nn.Module):
    """Attention from every pixel to every pixel, as in DiT.

    DiT's position embedding (fixed sinusoids of row and column) is added to the input of each attention layer, and not
    once to the input of the network.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = head_count(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x + place_features(x)).chunk(3, dim=-1)
        return self.out(self._attend(query, key, value))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """All are (N, H, W, C) except mask (N, 1, pixels, pixels), which is true where one pixel sees another."""
        q, k, v = (to_heads(part, self.heads) for part in (query, key, value))
        return from_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), query)


class WindowAttention(SelfAttention):
    """Attention inside windows of 8x8 pixels, shifted by half a window in every other block (Swin, arXiv 2103.14030).

    Positions are encoded as in SelfAttention, instead of by Swin's learned biases. Images whose sides are not multiples
    of 8 are padded, and no pixel sees the padding. Windows are not shifted along a side of 8 pixels or less.
    """

    def __init__(self, channels: int, shifted: bool) -> None:
        super().__init__(channels)
        self.shift = WINDOW // 2 if shifted else 0

    def forward(self, x: Tensor) -> Tensor:
        N, H, W, _ = x.shape
        down, right = (self.shift if size > WINDOW else 0 for size in (H, W))
        padding = (-H % WINDOW, -W % WINDOW)
        qkv = F.pad(self.qkv(x + place_features(x)), (0, 0, 0, padding[1], 0, padding[0]))
        query, key, value = cut(qkv.roll((-down, -right), (1, 2))).chunk(3, dim=-1)
        mask = None
        if down or right or any(padding):
            mask = window_mask((H, W), (down, right), x.device).repeat(N, 1, 1)[:, None]
        mixed = paste(self._attend(query, key, value, mask), qkv.shape[1:3])
        return self.out(mixed.roll((down, right), (1, 2))[:, :H, :W])


class FocusedLinearAttention(nn.Module):
    """f(Q) (f(K)^T V) / (f(Q) sum f(K)), plus a depthwise 5x5 convolution of V (FLatten, Han et al., arXiv 2308.00442).

    f is ``focused``, applied to each head. The authors' code has a learned factor of queries and keys, which is left
    out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = head_count(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.local = Depthwise(channels, 5)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).chunk(3, dim=-1)
        query, key, value = (to_heads(part, self.heads) for part in qkv)
        query, key = focused(query), focused(key)
        total = query @ key.sum(2, keepdim=True).transpose(2, 3)  # (N, heads, pixels, 1)
        mixed = query @ (key.transpose(2, 3) @ value) / total
        return self.out(from_heads(mixed, x) + self.local(qkv[2]))


class AgentAttention(nn.Module):
    """softmax(Q A^T) softmax(A K^T) V, plus a depthwise 3x3 convolution of V (Han et al., arXiv 2312.08874).

    The agents A are the means of the queries over 7x7 parts of the image. The learned biases of agents and pixels are
    left out, since their tables belong to one image size.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = head_count(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.local = Depthwise(channels, 3)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).chunk(3, dim=-1)
        down, across = (_averages(size, AGENTS, x.device).to(x.dtype) for size in x.shape[1:3])
        pooled = torch.einsum("qw,npwc->npqc", across, torch.einsum("ph,nhwc->npwc", down, qkv[0]))
        query, key, value, agents = (to_heads(part, self.heads) for part in (*qkv, pooled))
        gathered = F.scaled_dot_product_attention(agents, key, value)
        mixed = F.scaled_dot_product_attention(query, agents, gathered)
        return self.out(from_heads(mixed, x) + self.local(qkv[2]))


def _averages(size: int, parts: int, device: torch.device) -> Tensor:
    """Adaptive average pooling as a matrix (parts, size); a matrix product has deterministic gradients on a GPU."""
    return F.adaptive_avg_pool1d(torch.eye(size, dtype=torch.float64, device=device), parts).T


def head_count(channels: int) -> int:
    return channels // math.gcd(channels, 64)


def to_heads(x: Tensor, heads: int) -> Tensor:
    """(N, H, W, C) -> (N, heads, H * W, C / heads)."""
    return x.flatten(1, 2).unflatten(2, (heads, -1)).transpose(1, 2)


def from_heads(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``to_heads``, in the shape of ``like``."""
    return x.transpose(1, 2).reshape(like.shape)


def place_features(x: Tensor) -> Tensor:
    """Position features (H, W, C): sinusoids of the row in the first half of the channels, then of the column."""
    _, H, W, C = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = sinusoid(torch.arange(H, device=x.device, dtype=dtype), C // 2)
    columns = sinusoid(torch.arange(W, device=x.device, dtype=dtype), C - C // 2)
    return torch.cat((rows[:, None].expand(-1, W, -1), columns.expand(H, -1, -1)), dim=-1).to(x.dtype)


def focused(x: Tensor) -> Tensor:
    """ReLU, then the third power at unchanged length, which moves directions towards the nearest axes."""
    x = F.relu(x) + 1e-6
    power = x**FOCUS
    return power * (
        torch.linalg.vector_norm(x, dim=-1, keepdim=True) / torch.linalg.vector_norm(power, dim=-1, keepdim=True)
    )


def cut(x: Tensor) -> Tensor:
    """Cut images, whose sides are multiples of 8, into windows: (N, H, W, C) -> (N * windows, 8, 8, C)."""
    N, H, W, C = x.shape
    grid = x.reshape(N, H // WINDOW, WINDOW, W // WINDOW, WINDOW, C)
    return grid.transpose(2, 3).reshape(-1, WINDOW, WINDOW, C)


def paste(windows: Tensor, size: Sequence[int]) -> Tensor:
    """The inverse of ``cut``; size is (H, W)."""
    H, W = size
    grid = windows.reshape(-1, H // WINDOW, W // WINDOW, WINDOW, WINDOW, windows.shape[-1])
    return grid.transpose(2, 3).reshape(-1, H, W, windows.shape[-1])


def window_mask(size: tuple[int, int], moved: tuple[int, int], device: torch.device) -> Tensor:
    """Which pixels of a window see each other, bool (windows, 64, 64).

    Pixels do not see padding, nor pixels from the opposite edge of the image, which the shift brought into the window.
    """
    kinds = []
    for length, shift in zip(size, moved, strict=True):
        padded = length + -length % WINDOW
        place = torch.arange(padded, device=device) + shift
        kinds.append(torch.where(place % padded < length, place // padded, 2))  # inside, wrapped around, padding
    labels = cut((3 * kinds[0][:, None] + kinds[1])[None, ..., None]).flatten(1)
    return labels[:, :, None] == labels[:, None, :]
