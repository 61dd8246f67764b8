"""DiT (Peebles and Xie 2023): the transformer with adaLN-Zero that the paper compares DiCo with.

It is implemented here because diffusers' DiT computes a different function: its timestep frequencies end at 1/10000
instead of before it, and in training each of its blocks embeds timestep and class again and drops labels independently.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dico_t2i.config import DiTConfig
from dico_t2i.models.conditioning import TimestepEmbedding
from dico_t2i.models.peers.layers import Attention, FeedForward, Transformer, grid_positions, initialize, unpatch
from dico_t2i.ops import gated_residual, norm_modulate, residual_norm_modulate


class Block(nn.Module):
    """Attention and feed-forward, both with adaLN-Zero, on (N, H, W, C); uses the operators of DiCo's blocks."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = Attention(width, config.num_heads)
        self.ffn = FeedForward(width, config.mlp_ratio, gelu="tanh")

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (N, H, W, C), condition (N, C) after SiLU -> (N, H, W, C)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        branch = self.attention(norm_modulate(x, shift1, scale1))
        x, normed = residual_norm_modulate(x, branch, gate1, shift2, scale2)
        return gated_residual(x, gate2, self.ffn(normed))


class DiT(Transformer):
    """DiT with class labels, for any height and width that the patch size divides. A fresh model returns 0."""

    config: DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        width, patch = config.hidden_size, config.patch_size
        self.patches = nn.Conv2d(config.in_channels, width, patch, stride=patch)
        self.time_embedding = TimestepEmbedding(width)
        self.class_embedding = nn.Embedding(config.num_classes + (config.dropout_prob > 0), width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, patch * patch * config.out_channels)
        initialize(self, small=("time_embedding", "class_embedding"), zero=("modulation", "head"))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, pooled: None = None) -> Tensor:
        x = self.patches(x.to(self.head.weight.dtype)).permute(0, 2, 3, 1)
        _, H, W, C = x.shape
        x = x + grid_positions(H, W, C, x.device).to(x.dtype)
        condition = F.silu(self.time_embedding(t) + self.class_embedding(cond))
        for block in self.layers:
            x = self.run(block, x, condition)
        shift, scale = self.head_modulation(condition).chunk(2, dim=-1)
        return unpatch(self.head(norm_modulate(x, shift, scale)), self.config.patch_size)


NETWORK = DiT
