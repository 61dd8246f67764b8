"""What the paper's ablations (section 6) put in the place of the ConvModule, or of a part of it.

All take and return (N, H, W, C). Attention has heads of 64 channels, or of the largest power of two that divides the
width. The paper names the methods and gives no details; where ours differ from their sources is said at each.
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
FOCUS = 3  # the power of focused linear attention
AGENTS = 7  # agents of agent attention in a row, and in a column
REDUCTION = 16  # of the channels in squeeze-and-excitation


def ablated_mixer(config: DiCoConfig, channels: int, number: int) -> nn.Module | None:
    """The mixer of a stage's block of this number; None where it is DiCo's ConvModule."""
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


# ---- The ConvModule with other parts ----


class Depthwise(nn.Module):
    """Depthwise convolution with zero padding; the kernel is odd."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv(x, self.weight, self.bias)


class ConvVariant(nn.Module):
    """1x1, depthwise convolution, activation, channel attention, 1x1; parameters have the ConvModule's names."""

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
    """DiCo's own: each channel times the sigmoid of a linear map of all channels' means."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return channel_scale(x, torch.sigmoid(super().forward(x.mean((1, 2)))))


class SqueezeExcitation(nn.Module):
    """The same through a bottleneck of two layers (Hu et al., arXiv 1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, max(1, channels // REDUCTION))
        self.excite = nn.Linear(max(1, channels // REDUCTION), channels)

    def forward(self, x: Tensor) -> Tensor:
        return channel_scale(x, torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((1, 2)))))))


class ChannelSelfAttention(nn.Module):
    """Attention of channels to channels: softmax over j of temperature <q_i, k_j>, times v_j, of planes q, k, v.

    q_i and k_j have length 1 over the pixels (Restormer, Zamir et al., arXiv 2111.09881). One head; its own convolution
    and last projection are those that stand around it in the ConvModule.
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


# ---- In the place of the whole ConvModule ----


class SelfAttention(nn.Module):
    """Attention from every pixel to every pixel, as in DiT.

    The features of DiT's position embedding (fixed sinusoids of row and column) are added to the input of each
    attention, and not once to the network's.
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
        """All (N, H, W, C), but for the mask (N, 1, pixels, pixels): true for those that see each other."""
        q, k, v = (to_heads(part, self.heads) for part in (query, key, value))
        return from_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), query)


class WindowAttention(SelfAttention):
    """Attention inside windows of 8x8 pixels, in every other block moved by half a window (Swin, arXiv 2103.14030).

    Pixels are told apart by the features of SelfAttention, in the place of Swin's learned biases. Images whose sides
    are no multiples of 8 are padded, and no pixel sees the padding; windows don't move along a side of 8 or less.
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

    f is ``focused``, of each head. Without the learned factor of queries and keys that its authors' code has.
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

    The agents A are the queries' means over 7x7 parts of the image. Without the learned biases of agents and pixels,
    whose tables belong to one size of image.
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
    """(parts, size): adaptive average pooling as a product, whose gradients on a GPU are the same each time."""
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
    """(H, W, C): sinusoids of the row in the first half of the channels, of the column in the second."""
    _, H, W, C = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = sinusoid(torch.arange(H, device=x.device, dtype=dtype), C // 2)
    columns = sinusoid(torch.arange(W, device=x.device, dtype=dtype), C - C // 2)
    return torch.cat((rows[:, None].expand(-1, W, -1), columns.expand(H, -1, -1)), dim=-1).to(x.dtype)


def focused(x: Tensor) -> Tensor:
    """ReLU, then the third power with the length as it was: directions move towards the nearest axes."""
    x = F.relu(x) + 1e-6
    power = x**FOCUS
    return power * (
        torch.linalg.vector_norm(x, dim=-1, keepdim=True) / torch.linalg.vector_norm(power, dim=-1, keepdim=True)
    )


def cut(x: Tensor) -> Tensor:
    """Windows of an image whose sides they divide: (N, H, W, C) -> (N * windows, 8, 8, C)."""
    N, H, W, C = x.shape
    grid = x.reshape(N, H // WINDOW, WINDOW, W // WINDOW, WINDOW, C)
    return grid.transpose(2, 3).reshape(-1, WINDOW, WINDOW, C)


def paste(windows: Tensor, size: Sequence[int]) -> Tensor:
    """The inverse of ``cut``; size is (H, W)."""
    H, W = size
    grid = windows.reshape(-1, H // WINDOW, W // WINDOW, WINDOW, WINDOW, windows.shape[-1])
    return grid.transpose(2, 3).reshape(-1, H, W, windows.shape[-1])


def window_mask(size: tuple[int, int], moved: tuple[int, int], device: torch.device) -> Tensor:
    """Who sees whom in each window, (windows, 64, 64): not across what was an edge before the move, nor padding."""
    kinds = []
    for length, shift in zip(size, moved, strict=True):
        padded = length + -length % WINDOW
        place = torch.arange(padded, device=device) + shift
        kinds.append(torch.where(place % padded < length, place // padded, 2))  # inside, come around, padding
    labels = cut((3 * kinds[0][:, None] + kinds[1])[None, ..., None]).flatten(1)
    return labels[:, :, None] == labels[:, None, :]
