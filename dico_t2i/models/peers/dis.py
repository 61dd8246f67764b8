"""DiS (Fei et al. 2024): Mamba blocks that scan the tokens both ways, joined by long skips.

Names and shapes of the parameters are those of the released weights.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dico_t2i import randomness
from dico_t2i.config.networks import DiSConfig
from dico_t2i.models.conditioning import sinusoid
from dico_t2i.models.peers.layers import FinalLayer, LabelTable, Patches, PatchNetwork, RMSNorm, unpatch
from dico_t2i.models.peers.mamba import MambaMixer, without_biases

CONV_KERNEL = 4


class Block(nn.Module):
    """A mixer on the normalised sum of all that came before; ``skip`` joins a block of the first half."""

    def __init__(self, config: DiSConfig, skip: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.mixer = MambaMixer(width, CONV_KERNEL, config.depth, both_ways=True)
        self.norm = RMSNorm(width)
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(
        self, x: Tensor, residual: Tensor | None, skip: Tensor | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens x, residual and skip (N, L, C); returns the mixer's output and the new residual, in float32 or more.

        kept (N, 1, 1): what x is multiplied by before it is added, for stochastic depth; None is 1.
        """
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat((x, skip), dim=-1))
        residual = _added(residual, x, kept)
        return self.mixer(self.norm(residual)), residual


def _added(residual: Tensor | None, x: Tensor, kept: Tensor | None) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if residual is None:
        return wide
    return residual + wide if kept is None else torch.addcmul(residual, wide, kept.to(wide.dtype))


class DiS(PatchNetwork):
    """DiS with class labels or without a condition, for one size of latents: its positions are learned."""

    config: DiSConfig

    def __init__(self, config: DiSConfig) -> None:
        super().__init__(config)
        width, patch, half = config.hidden_size, config.patch_size, config.depth // 2
        classes = config.num_classes
        self.patch_embed = Patches(config.in_channels, width, patch)
        self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.label_emb = LabelTable(classes, config.dropout_prob, width) if classes else None
        tokens = 1 + bool(classes) + (config.latent_size // patch) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.in_blocks = nn.ModuleList(Block(config, skip=False) for _ in range(half))
        self.mid_block = Block(config, skip=False)
        self.out_blocks = nn.ModuleList(Block(config, skip=True) for _ in range(half))
        self.norm_f = RMSNorm(width)
        self.final_layer = FinalLayer(width, patch * patch * config.out_channels, modulated=bool(classes))
        without_biases(self)
        if self.label_emb is not None:
            nn.init.normal_(self.label_emb.embedding_table.weight, std=0.02)

    def residual_blocks(self) -> Iterator[nn.Module]:
        yield from (*self.in_blocks, self.mid_block, *self.out_blocks)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, pooled: None = None) -> Tensor:
        kept = self._stochastic_depth(x)
        grid = self.patch_embed(x)
        N, H, W, C = grid.shape
        dtype = self.pos_embed.dtype
        time = self.time_embed(sinusoid(t.to(torch.promote_types(torch.float32, dtype)), C).to(dtype))
        extra = [time] if self.label_emb is None else [self.label_emb(cond), time]
        x = torch.cat((*(token[:, None] for token in extra), grid.flatten(1, 2)), dim=1) + self.pos_embed
        residual: Tensor | None = None
        skips: list[Tensor] = []
        for number, block in enumerate(self.residual_blocks()):
            skip = skips.pop() if number > len(self.in_blocks) else None
            x, residual = self.run(block, x, residual, skip, kept[number])
            if number < len(self.in_blocks):
                skips.append(x)
        x = self.norm_f(_added(residual, x, kept[-1])[:, len(extra) :])
        return unpatch(self.final_layer(x.reshape(N, H, W, C), torch.stack(extra).sum(0)), self.config.patch_size)

    def _stochastic_depth(self, x: Tensor) -> list[Tensor | None]:
        """What each block's input, and the last one's output, are multiplied by in training: (N, 1, 1) each.

        The draws are a function of the noisy sample itself, so that they do not depend on ranks, on resumption, or on
        activations that are computed again.
        """
        depth, last = self.config.depth, self.config.drop_path
        if not self.training or not last:
            return [None] * (2 * (depth // 2) + 2)
        ramp = torch.linspace(0, last, depth, device="cpu").tolist()
        rates = [0.0, *ramp[: 2 * (depth // 2)], last]
        bits = x.detach().flatten(1)[:, :4].float().contiguous().view(torch.int32).long()
        index = (bits * torch.tensor([1, 3, 5, 7], device=x.device) << 8).sum(1) & (1 << 48) - 1
        drop = torch.tensor(rates, device=x.device, dtype=torch.float64)
        draws = randomness.uniform(0, "stochastic depth", index, (len(rates),))
        return list(((draws >= drop) / (1 - drop)).T[..., None, None])


def infer_config(state: Mapping[str, Tensor]) -> DiSConfig:
    """The dimensions of a released state dict, from its shapes. Raises ValueError if a key is missing."""
    try:
        width, channels, patch, _ = state["patch_embed.proj.weight"].shape
        rows, tokens = len(state["final_layer.linear.weight"]), state["pos_embed"].shape[1]
    except (KeyError, ValueError):
        raise ValueError("not a released DiS state dict: its patches, positions or final layer are missing") from None
    table = state.get("label_emb.embedding_table.weight")
    half = len({key.split(".")[1] for key in state if key.startswith("in_blocks.")})
    side = round((tokens - 1 - (table is not None)) ** 0.5)
    return DiSConfig(
        hidden_size=width,
        depth=2 * half,
        patch_size=patch,
        in_channels=channels,
        learn_sigma=rows == 2 * channels * patch**2,
        num_classes=0 if table is None else len(table) - 1,
        latent_size=side * patch,
    )


NETWORK = DiS
