"""Layers that the transformers over patches share. Tokens are (N, T, C), or (N, H, W, C) where they form a grid."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dico_t2i.config import TransformerConfig
from dico_t2i.models.network import Network


class Transformer(Network):
    """A network of blocks over patches."""

    config: TransformerConfig
    layers: nn.ModuleList

    def blocks(self) -> Iterator[nn.Module]:
        return iter(self.layers)

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        """The output of a block, which is recomputed in the backward pass if the config says so."""
        if self.training and self.config.checkpoint_stages:
            block = partial(checkpoint, block, use_reentrant=False)  # type: ignore[assignment]
        return block(*inputs)


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
    """DiT's fixed position embedding, float32 (height, width, channels): half of the channels for x, then half for y.

    Each half holds sines, then cosines, of the index times 10000^(-k / (channels / 4)), computed in float64.
    """
    quarter = channels // 4
    rates = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    halves = []
    for size in (width, height):
        angles = torch.arange(size, dtype=torch.float64, device=device)[:, None] * rates
        halves.append(torch.cat((angles.sin(), angles.cos()), dim=1))
    x, y = halves
    both = torch.cat((x[None].expand(height, -1, -1), y[:, None].expand(-1, width, -1)), dim=2)
    return both.float()


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
