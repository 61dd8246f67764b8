"""Stable Diffusion's autoencoder (Rombach et al., arXiv 2112.10752, section 3.1), with the weights' names of diffusers.

It computes what ``AutoencoderKL`` of diffusers does, with the same operations, so to the bit. A rank that imports that
class also imports torch's compiler and transformers: 2,500 modules, 180 MB and 5 s of CPU time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dico_t2i.encoders.local import check_whole, read_tensors, reading

_EPS = 1e-6
_BLOCKS = {"down_block_types": {"DownEncoderBlock2D"}, "up_block_types": {"UpDecoderBlock2D"}, "act_fn": {"silu"}}
# What the parts of an attention are called in older files, such as those of sd-vae-ft-ema.
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class KlSettings:
    """The part of a ``config.json`` that describes the network, with the defaults of diffusers."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "KlSettings | None":
        """The settings in a config; None if it has blocks or activations that this module lacks."""
        if any(not known.issuperset(_names(settings.get(key, ()))) for key, known in _BLOCKS.items()):
            return None
        return cls(**{field.name: settings[field.name] for field in fields(cls) if field.name in settings})


def _names(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


class KlNetwork(nn.Module):
    """Images (N, 3, H, W) to moments (N, 2C, h, w), and latents (N, C, h, w) to images."""

    def __init__(self, config: KlSettings) -> None:
        super().__init__()
        self.config, channels = config, config.latent_channels
        self.encoder, self.decoder = _Encoder(config), _Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else nn.Identity()

    def encode(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))


def read_network(config: KlSettings, weights: Path, dtype: torch.dtype) -> KlNetwork:
    """The network with the weights of a file. Raises ValueError if they are missing, or do not fit."""
    with torch.device("meta"):
        network = KlNetwork(config)
    with reading(weights):
        state = {_present_name(name): weight.to(dtype) for name, weight in read_tensors(weights).items()}
        report = network.load_state_dict(state, strict=False, assign=True)
    check_whole(weights.parent, {"missing_keys": report.missing_keys})
    return network.eval().requires_grad_(False)


def _present_name(name: str) -> str:
    layer, _, kind = name.rpartition(".")
    block, _, part = layer.rpartition(".")
    return f"{block}.{_OLDER[part]}.{kind}" if ".attentions." in name and part in _OLDER else name


class _Encoder(nn.Module):
    def __init__(self, config: KlSettings) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = _conv3x3(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList(
            _Level(inputs, width, config.layers_per_block, groups, "down" if number + 1 < len(widths) else "")
            for number, (inputs, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.mid_block = _Middle(widths[-1], config)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = _conv3x3(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class _Decoder(nn.Module):
    def __init__(self, config: KlSettings) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = _conv3x3(config.latent_channels, widths[0])
        self.mid_block = _Middle(widths[0], config)
        self.up_blocks = nn.ModuleList(
            _Level(inputs, width, config.layers_per_block + 1, groups, "up" if number + 1 < len(widths) else "")
            for number, (inputs, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = _conv3x3(widths[-1], config.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class _Level(nn.Module):
    """The residual blocks of a resolution, and the way to the next one."""

    def __init__(self, inputs: int, width: int, layers: int, groups: int, way: str) -> None:
        """way: "down", "up", or nothing."""
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(inputs if n == 0 else width, width, groups) for n in range(layers))
        self.downsamplers = nn.ModuleList([_Downsample(width)] if way == "down" else [])
        self.upsamplers = nn.ModuleList([_Upsample(width)] if way == "up" else [])

    def forward(self, x: Tensor) -> Tensor:
        for part in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = part(x)
        return x


class _Middle(nn.Module):
    """Two residual blocks at the lowest resolution, in most networks with an attention between them."""

    def __init__(self, width: int, config: KlSettings) -> None:
        super().__init__()
        groups = config.norm_num_groups
        self.attentions = nn.ModuleList([_Attention(width, groups)] if config.mid_block_add_attention else [])
        self.resnets = nn.ModuleList(_Residual(width, width, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = part(x)
        return x


class _Residual(nn.Module):
    def __init__(self, inputs: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inputs, _EPS), _conv3x3(inputs, width)
        self.norm2, self.conv2 = nn.GroupNorm(groups, width, _EPS), _conv3x3(width, width)
        self.conv_shortcut = nn.Identity() if inputs == width else nn.Conv2d(inputs, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return self.conv_shortcut(x) + inner


class _Attention(nn.Module):
    """Attention of all places to each other, with one head, added to its input."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, _EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        places = self.group_norm(x.flatten(2)).transpose(1, 2)
        q, k, v = (part(places).unsqueeze(2).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v))
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return self.to_out[0](mixed).transpose(1, 2).reshape(x.shape) + x


class _Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv3x3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _conv3x3(inputs: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, width, 3, padding=1)
