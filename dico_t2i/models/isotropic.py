"""The isotropic layouts of the paper's ablations (section 6): one width and one resolution, from patches to patches.

Patches are of 2x2, as DiT's are: the published comparison is with DiT-S/2, and at full resolution the same parameters
would cost four times the multiply-accumulates. The paper does not say what it took.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dico_t2i.models.blocks import Conv3x3, Head
from dico_t2i.ops import pixel_shuffle, pixel_unshuffle

Step = Callable[[Tensor], Tensor]


class PatchStem(Conv3x3):
    """(N, H, W, C) -> (N, H/2, W/2, width): a 3x3 convolution of what pixels of a patch have side by side."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(4 * channels, width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pixel_unshuffle(x))


class PatchHead(Head):
    """The head for the channels of four pixels, which it puts in their places."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, 4 * out_channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return pixel_shuffle(super().forward(x, condition))


def in_a_row(x: Tensor, steps: Sequence[Step], merges: nn.ModuleList) -> Tensor:
    """All blocks, one after the other.

    merges: none, or one for each block of the second half (U-ViT, arXiv 2209.12152): the first half's outputs, the last
    of them first, are concatenated to the second half's inputs, (N, H, W, 2C) -> (N, H, W, C).
    """
    kept: list[Tensor] = []
    second = len(steps) - len(merges)
    for number, step in enumerate(steps):
        if number >= second:
            x = merges[number - second](torch.cat((x, kept.pop()), dim=-1))
        x = step(x)
        if number < len(merges):
            kept.append(x)
    return x
