"""DiG (Zhu et al. 2024): DiT with gated linear attention, which scans the tokens in four directions in turn.

Names and shapes of the parameters are those of its code; no weights were released.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dico_t2i.config.networks import DiGConfig
from dico_t2i.models.blocks import Conv3x3
from dico_t2i.models.conditioning import SINUSOID_DIM, sinusoid
from dico_t2i.models.peers.layers import (
    FinalLayer,
    LabelTable,
    Patches,
    PatchNetwork,
    grid_positions,
    initialize,
    turned,
    unpatch,
)
from dico_t2i.ops import gated_linear_attention, gated_residual, norm_modulate, residual_norm_modulate

GATE_RANK = 16
GATE_NORMALIZER = 16  # log gates are divided by it
ATTENTION_GAIN = 2**-2.5  # of the initial weights inside the attention


class GatedLinearAttention(nn.Module):
    """Gated linear attention along the tokens of (N, H, W, C), row after row."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = (nn.Linear(width, width // 2, bias=False) for _ in range(2))
        self.v_proj, self.g_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.gk_proj = nn.Sequential(nn.Linear(width, GATE_RANK, bias=False), nn.Linear(GATE_RANK, width // 2))
        self.g_norm_swish_gate = nn.RMSNorm(width // heads, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        log_gates = F.logsigmoid(self.gk_proj(tokens)) / GATE_NORMALIZER
        inputs = (self.q_proj(tokens), self.k_proj(tokens), self.v_proj(tokens), log_gates)
        mixed, _ = gated_linear_attention(*(tensor.unflatten(-1, (self.heads, -1)) for tensor in inputs))
        return self.o_proj(self.g_norm_swish_gate(mixed).flatten(2) * F.silu(self.g_proj(tokens))).reshape(x.shape)


class GatedMLP(nn.Module):
    """SwiGLU, whose hidden width is 8/3 of the width, rounded up to a multiple of 256."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-int(width * 4 * 2 / 3) // 256) * 256
        self.gate_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * value)


class Block(nn.Module):
    """Attention and feed-forward, both with adaLN-Zero, and a depthwise convolution in the end, on (N, H, W, C)."""

    def __init__(self, config: DiGConfig, skip: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn = GatedLinearAttention(width, config.num_heads)
        self.mlp = GatedMLP(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.dw_conv = Conv3x3(width, width, groups=width)
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x: Tensor, condition: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (N, H, W, C), condition (N, C), skip with as many tokens as x, in any order -> (N, H, W, C)."""
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat((x, skip.reshape(x.shape)), dim=-1))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        branch = self.attn(norm_modulate(x, shift1, scale1))
        x, normed = residual_norm_modulate(x, branch, gate1, shift2, scale2)
        return self.dw_conv(gated_residual(x, gate2, self.mlp(normed)))


class TimeEmbedding(nn.Module):
    """Sinusoids and a two-layer MLP: (N,) -> (N, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOID_DIM, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        dtype = cast(nn.Linear, self.mlp[0]).weight.dtype
        return self.mlp(sinusoid(t.to(torch.promote_types(torch.float32, dtype)), SINUSOID_DIM).to(dtype))


class DiG(PatchNetwork):
    """DiG with class labels, for any height and width that the patch size divides. A fresh model returns 0.

    After each block the tokens are reversed, and after every second one rows and columns change places: a block scans
    rows forwards, the next one rows backwards, then columns forwards and columns backwards. At a depth that is no
    multiple of 4 the output is turned, as it is in the original.
    """

    config: DiGConfig

    def __init__(self, config: DiGConfig) -> None:
        super().__init__(config)
        width, patch, half = config.hidden_size, config.patch_size, config.depth // 2
        skips = config.skips != "none"
        self.x_embedder = Patches(config.in_channels, width, patch)
        self.t_embedder = TimeEmbedding(width)
        self.y_embedder = LabelTable(config.num_classes, config.dropout_prob, width) if config.num_classes else None
        self.blocks = nn.ModuleList(Block(config, skips and number > half) for number in range(config.depth))
        self.final_layer = FinalLayer(width, patch * patch * config.out_channels)
        self.register_buffer("pos_embed", self._positions(*[config.latent_size // patch] * 2).flatten(1, 2))
        self.register_load_state_dict_pre_hook(_keep_positions)
        self.reset_parameters()

    def residual_blocks(self) -> Iterator[nn.Module]:
        return iter(self.blocks)

    def reset_parameters(self) -> None:
        initialize(self, small=("t_embedder", "y_embedder"), zero=("adaLN_modulation", "final_layer"))
        width = self.config.hidden_size
        for module in self.modules():
            if isinstance(module, GatedLinearAttention):
                for linear in module.modules():
                    if isinstance(linear, nn.Linear):
                        nn.init.xavier_uniform_(linear.weight, ATTENTION_GAIN)
            elif isinstance(module, Conv3x3):
                nn.init.dirac_(module.weight, groups=width)
            elif isinstance(module, Block) and module.skip_linear is not None and self.config.skips == "identity":
                nn.init.eye_(module.skip_linear.weight)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, pooled: None = None) -> Tensor:
        x = self.x_embedder(x)
        N, H, W, C = x.shape
        positions = cast(Tensor, self.pos_embed)
        fits = H == W and positions.shape[1] == H * W
        x = x + (positions.reshape(1, H, W, C) if fits else self._positions(H, W)).to(x.dtype)
        condition = self.t_embedder(t) if self.y_embedder is None else self.t_embedder(t) + self.y_embedder(cond)
        kept: list[Tensor] = []
        half = self.config.depth // 2
        for number, block in enumerate(self.blocks):
            skip = (kept.pop(),) if self.config.skips != "none" and number > half else ()
            x = turned(self.run(block, x, condition, *skip), transposed=number % 2 == 1, reversed_=True)
            if self.config.skips != "none" and number < half - 1:
                kept.append(x)
        return unpatch(self.final_layer(x.reshape(N, H, W, C), condition), self.config.patch_size)

    def _positions(self, height: int, width: int) -> Tensor:
        """(1, height, width, C) in torch's default dtype."""
        weight = self.x_embedder.proj.weight
        table = grid_positions(height, width, self.config.hidden_size, weight.device)
        return table.to(torch.get_default_dtype())[None]


def _keep_positions(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Checkpoints and exported folders hold parameters only; the table of positions is not one."""
    state.setdefault(f"{prefix}pos_embed", module.pos_embed)


NETWORK = DiG
