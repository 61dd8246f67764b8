"""U-ViT (Bao et al. 2023): time and text, or class, are tokens of the sequence, and long skips join its two halves.

It is implemented here because diffusers' UVit2DModel is a different network, that of aMUSEd.
"""

import torch
from torch import Tensor, nn

from dico_t2i.config import UViTConfig
from dico_t2i.models.conditioning import sinusoid
from dico_t2i.models.peers.layers import Attention, FeedForward, LabelTable, Transformer, unpatch


class Block(nn.Module):
    """Pre-norm attention and feed-forward on (N, T, C); with ``skip`` it also takes an output of the first half."""

    def __init__(self, config: UViTConfig, skip: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.merge = nn.Linear(2 * width, width) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, config.num_heads, qkv_bias=False)
        self.ffn = FeedForward(width, config.mlp_ratio)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.merge is not None:
            assert skip is not None
            x = self.merge(torch.cat((x, skip), dim=-1))
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class UViT(Transformer):
    """U-ViT with text or classes, for latents of one size, since its position embedding is learned."""

    config: UViTConfig

    def __init__(self, config: UViTConfig) -> None:
        super().__init__(config)
        width, patch = config.hidden_size, config.patch_size
        grid, half = config.latent_size // patch, config.depth // 2
        self.patches = nn.Conv2d(config.in_channels, width, patch, stride=patch)
        of_text = config.condition == "text"
        self.text = nn.Linear(config.text_dim, width) if of_text else None
        self.label = None if of_text else LabelTable(config.num_classes, config.dropout_prob, width)
        tokens = 1 + (config.text_tokens if of_text else 1) + grid * grid
        self.positions = nn.Parameter(torch.empty(1, tokens, width))
        self.layers = nn.ModuleList(Block(config, skip=number > half) for number in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, patch * patch * config.out_channels)
        self.smooth = nn.Conv2d(config.out_channels, config.out_channels, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the release does: truncated normal with std 0.02.

        Convolutions and the embeddings of classes keep torch's initial values.
        """
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, pooled: None = None) -> Tensor:
        dtype = self.head.weight.dtype
        x = self.patches(x.to(dtype)).permute(0, 2, 3, 1)
        N, H, W, C = x.shape
        time = sinusoid(t, C).to(dtype)[:, None]
        x = torch.cat((time, self._condition(cond), x.reshape(N, H * W, C)), dim=1) + self.positions
        skips: list[Tensor] = []
        half = self.config.depth // 2
        for number, block in enumerate(self.layers):
            x = self.run(block, x, skips.pop()) if number > half else self.run(block, x)
            if number < half:
                skips.append(x)
        x = self.head(self.norm(x)[:, -H * W :])
        return self.smooth(unpatch(x.reshape(N, H, W, -1), self.config.patch_size))

    def _condition(self, cond: Tensor) -> Tensor:
        """The tokens of the text (N, T, text_dim), or the one of the classes (N,): (N, T or 1, width)."""
        if self.text is not None:
            return self.text(cond)
        assert self.label is not None
        return self.label(cond)[:, None]


NETWORK = UViT
