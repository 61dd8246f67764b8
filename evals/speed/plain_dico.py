"""DiCo in plain PyTorch: the baseline of evals/throughput.py, and an independent check of the network.

It was written only from the paper and the list of released parameter names, in the usual style of convolutional code:
(N, C, H, W) throughout, 1x1 convolutions as ``nn.Conv2d``, channels moved to the end and back around each LayerNorm,
and the text's kernels as a convolution with N*C groups. Parameters have the released names; those of the text, which
were not released, have our names.
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dico_t2i.models import DiCoConfig
from dico_t2i.models.official import official_key


class ChannelNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6).permute(0, 3, 1, 2).contiguous()


class TimeEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        rates = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
        angles = t.float()[:, None] * rates
        features = torch.cat((torch.cos(angles), torch.sin(angles)), dim=1)
        return self.mlp(features.to(next(self.parameters()).dtype))


class Embeddings(nn.Module):
    """The condition at the three widths: tables of classes, projections of the pooled text, or nothing."""

    def __init__(self, config: DiCoConfig) -> None:
        super().__init__()
        self.kind = "pooled" if config.pooled_text else config.condition
        rows = config.num_classes + (config.dropout_prob > 0)
        for level in range(3):
            width = config.hidden_size * 2**level
            if self.kind == "class":
                self.add_module(f"embedding_table_{level}", nn.Embedding(rows, width))
            elif self.kind == "pooled":
                self.add_module(f"embedding_table_{level}", nn.Linear(config.pooled_dim, width))

    def forward(self, cond: Tensor, pooled: Tensor | None) -> list[Tensor | float]:
        if self.kind == "text":
            return [0.0, 0.0, 0.0]
        source = cond if self.kind == "class" else pooled
        return [getattr(self, f"embedding_table_{level}")(source) for level in range(3)]


class TextProjection(nn.Module):
    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(text_dim, width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(F.gelu(self.hidden(tokens)))


class Text(nn.Module):
    """The dynamic depthwise convolution."""

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.projection = TextProjection(text_dim, width)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return grouped_text_dwconv(x, self.projection(tokens))


def grouped_text_dwconv(x: Tensor, context: Tensor) -> Tensor:
    """Compute ``dico_t2i.ops.text_dwconv`` by a convolution with N*C groups."""
    N, C, H, W = x.shape
    taps = torch.cat([context] + [context[:, -1:]] * (81 - context.shape[1]), dim=1)
    kernels = taps.transpose(1, 2).reshape(N * C, 1, 9, 9)
    return F.conv2d(x.reshape(1, N * C, H, W), kernels, padding=4, groups=N * C).reshape(N, C, H, W)


class PlainBlock(nn.Module):
    def __init__(self, width: int, ratio: float, text_dim: int | None) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.norm1, self.norm2 = ChannelNorm(), ChannelNorm()
        self.conv1 = nn.Conv2d(width, width, 1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.ca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1), nn.Sigmoid())
        self.conv3 = nn.Conv2d(width, width, 1)
        self.conv4 = nn.Conv2d(width, int(ratio * width), 1)
        self.conv5 = nn.Conv2d(int(ratio * width), width, 1)
        self.text = Text(text_dim, width) if text_dim else None

    def forward(self, x: Tensor, condition: Tensor, tokens: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            part[:, :, None, None] for part in self.adaLN_modulation(condition).chunk(6, dim=1)
        )
        h = self.norm1(x) * (1 + scale1) + shift1
        h = F.gelu(self.conv2(self.conv1(h)))
        h = h * self.ca(h)
        x = x + gate1 * self.conv3(h)
        if self.text is not None:
            x = x + self.text(self.norm1(x), tokens)
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.conv5(F.gelu(self.conv4(h)))


class Resample(nn.Module):
    """3x3 convolution without bias, then a pixel shuffle (up) or unshuffle."""

    def __init__(self, width: int, up: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(width, 2 * width if up else width // 2, 3, padding=1, bias=False)
        self.body = nn.Sequential(conv, nn.PixelShuffle(2) if up else nn.PixelUnshuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Stem(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.proj.weight.dtype))


class FinalLayer(nn.Module):
    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.norm = ChannelNorm()
        self.out_proj = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = (part[:, :, None, None] for part in self.adaLN_modulation(condition).chunk(2, dim=1))
        return self.out_proj(self.norm(x) * (1 + scale) + shift)


class PlainDiCo(nn.Module):
    """A network with the inputs and outputs of ``dico_t2i.models.DiCo``, for classes, and for text by convolution."""

    def __init__(self, config: DiCoConfig) -> None:
        super().__init__()
        if config.condition == "text" and (config.text_fusion, config.text_projection) != ("dwc", "block"):
            raise ValueError("the plain DiCo supports text only by convolution, with a projection in each block")
        D = config.hidden_size
        text_dim = config.text_dim if config.condition == "text" else None

        def blocks(width: int, depth: int) -> nn.ModuleList:
            return nn.ModuleList(PlainBlock(width, config.mlp_ratio, text_dim) for _ in range(depth))

        depths = config.depths
        self.x_embedder = Stem(config.in_channels, D)
        self.t_embedder_1, self.t_embedder_2, self.t_embedder_3 = (TimeEmbedding(D * 2**level) for level in range(3))
        self.y_embedder = Embeddings(config)
        self.encoder_level_1, self.down1_2 = blocks(D, depths[0]), Resample(D, up=False)
        self.encoder_level_2, self.down2_3 = blocks(2 * D, depths[1]), Resample(2 * D, up=False)
        self.latent, self.up3_2 = blocks(4 * D, depths[2]), Resample(4 * D, up=True)
        self.reduce_chan_level2 = nn.Conv2d(4 * D, 2 * D, 1)
        self.decoder_level_2, self.up2_1 = blocks(2 * D, depths[3]), Resample(2 * D, up=True)
        self.reduce_chan_level1 = nn.Conv2d(2 * D, 2 * D, 1)
        self.decoder_level_1 = blocks(2 * D, depths[4])
        self.final_layer = FinalLayer(2 * D, config.out_channels)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, pooled: Tensor | None = None) -> Tensor:
        y1, y2, y3 = self.y_embedder(cond, pooled)
        c1, c2, c3 = self.t_embedder_1(t) + y1, self.t_embedder_2(t) + y2, self.t_embedder_3(t) + y3
        skip1 = _through(self.encoder_level_1, self.x_embedder(x), c1, cond)
        skip2 = _through(self.encoder_level_2, self.down1_2(skip1), c2, cond)
        x = _through(self.latent, self.down2_3(skip2), c3, cond)
        x = self.reduce_chan_level2(torch.cat((self.up3_2(x), skip2), dim=1))
        x = _through(self.decoder_level_2, x, c2, cond)
        x = self.reduce_chan_level1(torch.cat((self.up2_1(x), skip1), dim=1))
        x = _through(self.decoder_level_1, x, c2, cond)
        return self.final_layer(x, c2)


def _through(blocks: nn.ModuleList, x: Tensor, condition: Tensor, cond: Tensor) -> Tensor:
    for block in blocks:
        x = cast(PlainBlock, block)(x, condition, cond)
    return x


def plain_key(name: str) -> str:
    """The plain network's name for one of our parameters."""
    if ".text." not in name:
        return official_key(name)
    stage, index, *rest = name.removeprefix("stages.").split(".")
    block = official_key(f"stages.{stage}.{index}.ffn.expand.bias").rsplit(".", 2)[0]
    return ".".join((block, *rest))


def load_ours(plain: PlainDiCo, state: Mapping[str, Tensor]) -> None:
    """Copy our state dict into the plain network. Raises KeyError or RuntimeError if the models differ."""
    parameters = dict(plain.named_parameters())
    if {plain_key(name) for name in state} != set(parameters):
        raise KeyError("the two networks have different parameters")
    with torch.no_grad():
        for name, value in state.items():
            parameter = parameters[plain_key(name)]
            parameter.copy_(value.reshape(parameter.shape))
