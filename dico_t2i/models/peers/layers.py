"""Layers that the transformers over patches share. Tokens are (N, T, C), or (N, H, W, C) where they form a grid."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dico_t2i.config import PatchConfig
from dico_t2i.models.network import Network
from dico_t2i.ops import norm_modulate


class PatchNetwork(Network):
    """A network of blocks over patches."""

    config: PatchConfig

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        """The output of a block, which is recomputed in the backward pass if the config says so."""
        if self.training and self.config.checkpoint_stages:
            block = partial(checkpoint, block, use_reentrant=False)  # type: ignore[assignment]
        return block(*inputs)


class Transformer(PatchNetwork):
    """A network whose blocks are ``layers``."""

    layers: nn.ModuleList

    def residual_blocks(self) -> Iterator[nn.Module]:
        return iter(self.layers)


class Patches(nn.Module):
    """The patch embedding: (N, C, H, W) -> (N, H / patch, W / patch, width)."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.proj.weight.dtype)).permute(0, 2, 3, 1)


class LabelTable(nn.Module):
    """The embeddings of the classes, and of the null class where labels are dropped: (N,) -> (N, width)."""

    def __init__(self, classes: int, dropout_prob: float, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + (dropout_prob > 0), width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class FinalLayer(nn.Module):
    """Modulated norm and a linear layer to the pixels of a patch, on (N, H, W, C).

    Without ``modulated`` there is no condition, and the norm has neither shift nor scale.
    """

    def __init__(self, width: int, out: int, modulated: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)) if modulated else None

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if self.adaLN_modulation is None:
            return self.linear(norm_modulate(x))
        return self.linear(norm_modulate(x, *self.adaLN_modulation(condition).chunk(2, dim=-1)))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-5) times a weight, over channels; computed in x's dtype, given in the weight's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), 1e-5).to(self.weight.dtype)


def turned(x: Tensor, transposed: bool, reversed_: bool) -> Tensor:
    """The grid (N, H, W, C) with its tokens in another order: columns for rows, and the last token first."""
    if transposed:
        x = x.transpose(1, 2)
    return (x.flip(1, 2) if reversed_ else x).contiguous()


class Attention(nn.Module):
    """Multi-head self-attention on (N, T, C), or on all positions of (N, H, W, C)."""

    def __init__(self, width: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2)
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.project(mixed.transpose(1, 2).flatten(2)).reshape(x.shape)


class FeedForward(nn.Module):
    """Two linear layers with GELU between them; gelu="tanh" is the approximation that DiT uses."""

    def __init__(self, width: int, ratio: float, gelu: Literal["none", "tanh"] = "none") -> None:
        super().__init__()
        self.gelu = gelu
        self.expand = nn.Linear(width, int(ratio * width))
        self.project = nn.Linear(int(ratio * width), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.gelu(self.expand(x), approximate=self.gelu))


def grid_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """DiT's fixed position embedding, float64 (height, width, channels): half of the channels for x, then half for y.

    Each half holds sines, then cosines, of the index times 10000^(-k / (channels / 4)).
    """
    quarter = channels // 4
    rates = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    halves = []
    for size in (width, height):
        angles = torch.arange(size, dtype=torch.float64, device=device)[:, None] * rates
        halves.append(torch.cat((angles.sin(), angles.cos()), dim=1))
    x, y = halves
    return torch.cat((x[None].expand(height, -1, -1), y[:, None].expand(-1, width, -1)), dim=2)


def unpatch(x: Tensor, patch: int) -> Tensor:
    """(N, h, w, patch * patch * C), channels last in each patch -> (N, C, h * patch, w * patch)."""
    N, h, w, _ = x.shape
    x = x.reshape(N, h, w, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(N, -1, h * patch, w * patch)


def initialize(network: nn.Module, small: Iterable[str], zero: Iterable[str]) -> None:
    """Initialise as DiT does: Xavier-uniform matrices, where a patch convolution counts as (out, in * patch * patch).

    Biases become 0. small, zero: parts of names; the parameters with such a name are drawn from N(0, 0.02), or set to
    0. The weights of norms, and everything else with one dimension, are left unchanged.
    """
    for name, parameter in network.named_parameters():
        if any(part in name for part in zero) or name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif any(part in name for part in small):
            nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim > 1 and name.endswith("weight"):
            nn.init.xavier_uniform_(parameter.view(len(parameter), -1))
