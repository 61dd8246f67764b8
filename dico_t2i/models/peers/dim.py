"""DiM (Teng et al. 2024): Mamba blocks that scan the tokens in four directions in turn, joined by long skips.

Names and shapes of the parameters are those of the released weights.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dico_t2i.config.networks import DiMConfig
from dico_t2i.models.blocks import Conv3x3
from dico_t2i.models.conditioning import SINUSOID_DIM, sinusoid
from dico_t2i.models.peers.layers import LabelTable, Patches, PatchNetwork, RMSNorm, turned, unpatch
from dico_t2i.models.peers.mamba import MambaMixer, without_biases

CONV_KERNEL = 3
PADDING = 3  # tokens at the end of each row, and rows at the end of the grid
NARROW = 512  # up to this width one matrix joins a skip, above it two


class Order(NamedTuple):
    """One of the four directions in which the grid is scanned."""

    columns: bool
    backwards: bool


ORDERS = (Order(False, False), Order(False, True), Order(True, False), Order(True, True))


def order_of(number: int, depth: int) -> Order:
    """The direction of a block; the second half mirrors the first."""
    return ORDERS[min(number, depth - 1 - number) % 4]


class Turn(NamedTuple):
    """How to change the order of the tokens that lie in a grid of height x width, behind ``front`` others."""

    front: int
    height: int
    width: int
    transposed: bool
    reversed_: bool

    def __call__(self, x: Tensor) -> Tensor:
        """(N, front + height * width, C), the same shape."""
        if not (self.transposed or self.reversed_):
            return x
        grid = x[:, self.front :].unflatten(1, (self.height, self.width))
        return torch.cat((x[:, : self.front], turned(grid, self.transposed, self.reversed_).flatten(1, 2)), dim=1)


class Norm(nn.Module):
    """A norm under the name that the release gives it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Block(nn.Module):
    """A mixer on the modulated norm of all that came before, without a feed-forward."""

    def __init__(self, config: DiMConfig, skip: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.scale_shift_table = nn.Parameter(torch.randn(3, width) / width**0.5)
        self.norm1 = Norm(width)
        self.attn1 = MambaMixer(width, CONV_KERNEL, config.depth)
        self.skip_linear: nn.Module | None = None
        if skip and width <= NARROW:
            self.skip_linear = nn.Linear(2 * width, width)
        elif skip:
            self.skip_linear = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        condition: Tensor,
        skip: Tensor | None = None,
        turn: Turn | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens x, residual and skip (N, L, C), condition (N, 3C); returns the gated output and the new residual.

        turn: how the tokens are put in the order of this block.
        """
        residual = x if residual is None else x + residual
        if skip is not None:
            residual = self._joined(residual, skip)
        residual = residual if turn is None else turn(residual)
        shift, scale, gate = (self.scale_shift_table + condition.unflatten(1, (3, -1)))[:, :, None].unbind(1)
        return (1 + gate) * self.attn1(torch.addcmul(shift, self.norm1(residual), 1 + scale)), residual

    def _joined(self, x: Tensor, skip: Tensor) -> Tensor:
        if isinstance(self.skip_linear, nn.ModuleList):
            first, second = self.skip_linear
            return first(x) + second(skip)
        assert self.skip_linear is not None
        return self.skip_linear(torch.cat((x, skip), dim=-1))


class TimeMLP(nn.Module):
    """Two layers on the timestep's features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(SINUSOID_DIM, width), nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))


class TimeAndLabel(nn.Module):
    """The sum of a timestep's and a label's embedding."""

    def __init__(self, config: DiMConfig) -> None:
        super().__init__()
        width, classes = config.hidden_size, config.num_classes
        self.timestep_embedder = TimeMLP(width)
        self.class_embedder = LabelTable(classes, config.dropout_prob, width) if classes else None

    def forward(self, t: Tensor, labels: Tensor) -> Tensor:
        dtype = self.timestep_embedder.linear_1.weight.dtype
        time = self.timestep_embedder(_sinusoid(t, SINUSOID_DIM, dtype))
        return time if self.class_embedder is None else time + self.class_embedder(labels)


class SharedModulation(nn.Module):
    """What all blocks are modulated by: (N,) and (N,) -> (N, 3C)."""

    def __init__(self, config: DiMConfig) -> None:
        super().__init__()
        self.emb = TimeAndLabel(config)
        self.linear = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, t: Tensor, labels: Tensor) -> Tensor:
        return self.linear(F.silu(self.emb(t, labels)))


class Adapter(nn.Module):
    """What fits Mamba to images: depthwise convolutions before and after, and tokens that mark where rows end."""

    def __init__(self, config: DiMConfig) -> None:
        super().__init__()
        width, self.pad = config.hidden_size, config.pad
        self.pad_token_dec_split = nn.Parameter(0.02 * torch.randn(1, PADDING, width))
        self.pad_token = nn.Parameter(0.02 * torch.randn(1, width, PADDING))
        self.first_smoother, self.last_smoother = (_smoother(width) for _ in range(2))

    def padded(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H + 3, W + 3, C)."""
        N, H, W, _ = x.shape
        row, column = (torch.arange(PADDING, device=x.device) for _ in range(2))
        below = torch.arange(PADDING * (W + PADDING), device=x.device) % PADDING
        if self.pad == "lateral":
            below = row.repeat_interleave(W + PADDING)
        tokens = self.pad_token[0].T
        right = tokens[column].expand(N, H, -1, -1)
        bottom = tokens[below].reshape(1, PADDING, W + PADDING, -1).expand(N, -1, -1, -1)
        return torch.cat((torch.cat((x, right), dim=2), bottom), dim=1)


class DiM(PatchNetwork):
    """DiM with class labels or without a condition; positions for other sizes than its own are interpolated."""

    config: DiMConfig

    def __init__(self, config: DiMConfig) -> None:
        super().__init__(config)
        width, patch, half = config.hidden_size, config.patch_size, config.depth // 2
        classes, self.grid = config.num_classes, config.latent_size // patch
        self.pos_embed = Patches(config.in_channels, width, patch)
        self.label_emb = nn.Embedding(classes + (config.dropout_prob > 0), width) if classes else None
        self.adaln_single = SharedModulation(config)
        self.additional_embed = nn.Parameter(torch.zeros(1, 1 + bool(classes) + self.grid**2, width))
        self.a4m_adapter = Adapter(config)
        self.transformer_blocks = nn.ModuleList(Block(config, number > half) for number in range(config.depth))
        self.norm_out = Norm(width)
        self.proj_out_1, self.proj_out_2 = nn.Linear(width, 2 * width), nn.Linear(width, patch**2 * config.out_channels)
        without_biases(self)
        small = ("label_emb", "embedding_table", "timestep_embedder")
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and any(part in name for part in small):
                nn.init.normal_(parameter, std=0.02)

    def residual_blocks(self) -> Iterator[nn.Module]:
        return iter(self.transformer_blocks)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, pooled: None = None) -> Tensor:
        t = t + self.config.first_timestep
        x = self.pos_embed(x)
        N, H, W, C = x.shape
        modulation = self.adaln_single(t, cond)
        front = [_sinusoid(t, C, x.dtype)] + ([] if self.label_emb is None else [self.label_emb(cond)])
        x = torch.cat((*(token[:, None] for token in front), x.flatten(1, 2)), dim=1) + self._positions(H, W)
        extra, grid = x[:, : len(front)], x[:, len(front) :].reshape(N, H, W, C)
        grid = self.a4m_adapter.padded(self.a4m_adapter.first_smoother(grid))
        marks = self.a4m_adapter.pad_token_dec_split.expand(N, -1, -1)
        x = self._through_blocks(torch.cat((extra, marks, grid.flatten(1, 2)), dim=1), modulation, H, W)
        grid = x[:, len(front) + PADDING :].reshape(N, H + PADDING, W + PADDING, C)[:, :H, :W]
        shift, scale = self.proj_out_1(F.silu(torch.stack(front).sum(0)))[:, None, None].chunk(2, dim=-1)
        grid = torch.addcmul(shift, self.norm_out(self.a4m_adapter.last_smoother(grid)), 1 + scale)
        return unpatch(self.proj_out_2(grid), self.config.patch_size)

    def _through_blocks(self, x: Tensor, modulation: Tensor, height: int, width: int) -> Tensor:
        """The tokens after all blocks, in the order in which they came; (height, width) is the grid without padding."""
        depth, half = self.config.depth, self.config.depth // 2
        front = x.shape[1] - (height + PADDING) * (width + PADDING)
        residual: Tensor | None = None
        skips: list[Tensor] = []
        last = ORDERS[0]
        for number, block in enumerate(self.transformer_blocks):
            order = order_of(number, depth)
            sides = (height + PADDING, width + PADDING)
            turn = Turn(
                front,
                *(sides[::-1] if last.columns else sides),
                transposed=order.columns != last.columns,
                reversed_=order.backwards != last.backwards,
            )
            skip = skips.pop() if number > half else None
            x, residual = self.run(block, x, residual, modulation, skip, turn)
            last = order
            if 0 < number <= half:
                skips.append(x + residual)
        return x if residual is None else x + residual

    def _positions(self, height: int, width: int) -> Tensor:
        """(1, tokens, C) for a grid of height x width."""
        if (height, width) == (self.grid, self.grid):
            return self.additional_embed
        front = self.additional_embed.shape[1] - self.grid**2
        grid = self.additional_embed[:, front:].reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (height, width), mode="bilinear").flatten(2).transpose(1, 2)
        return torch.cat((self.additional_embed[:, :front], grid), dim=1)


def _sinusoid(t: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """In float64 for a float64 network, and else computed in float32 and rounded at the end."""
    return sinusoid(t.to(torch.promote_types(torch.float32, dtype)), width).to(dtype)


def _smoother(width: int) -> Conv3x3:
    """A depthwise convolution with torch's initial weights."""
    smoother, plain = Conv3x3(width, width, groups=width), nn.Conv2d(width, width, 3, groups=width)
    smoother.load_state_dict(plain.state_dict())
    return smoother


def infer_config(state: Mapping[str, Tensor]) -> DiMConfig:
    """The dimensions of a released state dict, from its shapes. Raises ValueError if a key is missing."""
    try:
        width, channels, patch, _ = state["pos_embed.proj.weight"].shape
        tokens, table = state["additional_embed"].shape[1], state.get("label_emb.weight")
    except (KeyError, ValueError):
        raise ValueError("not a released DiM state dict: its patches or positions are missing") from None
    side = round((tokens - 1 - (table is not None)) ** 0.5)
    return DiMConfig(
        hidden_size=width,
        depth=len({key.split(".")[1] for key in state if key.startswith("transformer_blocks.")}),
        patch_size=patch,
        in_channels=channels,
        num_classes=0 if table is None else len(table) - 1,
        latent_size=side * patch,
        pad="lateral" if side * patch <= 32 else "rho",
    )


NETWORK = DiM
