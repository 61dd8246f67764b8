"""TAESD's networks (Bohan 2023) from their own files, in which a network is one chain of layers with numbered keys.

The structure follows from the keys: a key "conv.0.weight" belongs to a residual block, any other weight to a
convolution. A convolution without bias halves the resolution in an encoder, and follows a doubling in a decoder.
FLUX.2's blocks at the lowest resolution have a further branch, "pool", which comes before everything else in the block.
"""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from dico_t2i.encoders.local import reading

State = Mapping[str, Tensor]

# The names of the files of encoder and decoder, the preferred ones first.
NAMES = ("", "taesd_", "taesdxl_", "taesd3_", "taef1_", "taef2_")
FILES = tuple(tuple(f"{name}{part}.safetensors" for name in NAMES) for part in ("encoder", "decoder"))


class Clamp(nn.Module):
    """Limits latents softly to -3..3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """A residual block of three convolutions; with ``pool``, another residual branch goes first."""

    def __init__(self, state: State) -> None:
        super().__init__()
        channels, inputs = state["conv.0.weight"].shape[:2]
        layers: list[nn.Module] = []
        for number in (0, 2, 4):
            layers += [nn.Conv2d(inputs if number == 0 else channels, channels, 3, padding=1), nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])
        self.skip = nn.Conv2d(inputs, channels, 1, bias=False) if "skip.weight" in state else nn.Identity()
        if "pool.0.weight" in state:
            inner = len(state["pool.0.weight"])
            self.pool = nn.Sequential(
                nn.Conv2d(inputs, inner, 1, bias=False),
                nn.GroupNorm(4, inner),
                nn.ReLU(),
                nn.Conv2d(inner, inputs, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + self.skip(x))


def read_encoder(file: Path) -> tuple[nn.Sequential, int, int]:
    """The encoder of images in 0..1, (N, 3, H, W) -> (N, C, h, w), with C and the ratio of image size to latent size.

    Raises ValueError, with the path, for a file that is not one.
    """
    parts, layers = _read(file, "encoder"), list[nn.Module]()
    for state in parts:
        layers.append(_layer(state, stride=1 if "bias" in state else 2))
    downscale = 2 ** sum("conv.0.weight" not in state and "bias" not in state for state in parts)
    return nn.Sequential(*layers), len(parts[-1]["weight"]), downscale


def read_decoder(file: Path) -> nn.Sequential:
    """The decoder to images in about 0..1, (N, C, h, w) -> (N, 3, H, W). Raises ValueError as ``read_encoder`` does."""
    first, *rest = _read(file, "decoder")
    layers: list[nn.Module] = [Clamp(), _layer(first), nn.ReLU()]
    for state in rest:
        if "weight" in state and "bias" not in state:
            layers.append(nn.Upsample(scale_factor=2))
        layers.append(_layer(state))
    return nn.Sequential(*layers)


def _layer(state: State, stride: int = 1) -> nn.Module:
    """A block or a convolution with its weights."""
    layer: nn.Module = Block(state) if "conv.0.weight" in state else _convolution(state, stride)
    layer.load_state_dict(dict(state))
    return layer


def _convolution(state: State, stride: int) -> nn.Conv2d:
    channels, inputs = state["weight"].shape[:2]
    return nn.Conv2d(inputs, channels, 3, stride, padding=1, bias="bias" in state)


def _read(file: Path, what: str) -> list[dict[str, Tensor]]:
    """The weights of each layer of the chain, in order, in float32."""
    from safetensors.torch import load_file

    with reading(file):
        state = load_file(file)
    try:
        numbered = sorted((int(key.split(".", 1)[0]), key.split(".", 1)[1], value) for key, value in state.items())
        parts = [
            {name: value.float() for _, name, value in group} for _, group in groupby(numbered, lambda entry: entry[0])
        ]
        inputs, outputs = parts[0]["weight"].shape[1], parts[-1]["weight"].shape[0]
    except (ValueError, KeyError, IndexError):
        raise ValueError(f"{file}: it does not hold the {what} of a TAESD") from None
    if (inputs if what == "encoder" else outputs) != 3:
        raise ValueError(f"{file}: it does not hold the {what} of a TAESD, which has images of 3 channels")
    return parts
