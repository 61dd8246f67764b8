"""The isotropic layouts of the paper's ablations (section 6): one width and one resolution throughout.

Patches have 2x2 pixels, as in DiT-S/2, with which the paper compares; at full resolution the same parameters would need
four times the multiply-accumulates. The paper does not state the patch size it used.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dico_t2i.models.blocks import Conv3x3, Head
from dico_t2i.ops import pixel_shuffle, pixel_unshuffle

Step = Callable[[Tensor], Tensor]


class PatchStem(Conv3x3):
    """(N, H, W, C) -> (N, H/2, W/2, width): a 3x3 convolution on the patches' pixels, stacked as channels."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(4 * channels, width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pixel_unshuffle(x))


class PatchHead(Head):
    """The head that predicts the channels of a patch's four pixels and puts each pixel in its place."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, 4 * out_channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return pixel_shuffle(super().forward(x, condition))


def in_a_row(x: Tensor, steps: Sequence[Step], merges: nn.ModuleList) -> Tensor:
    """Run all blocks, one after the other.

    merges: empty, or one layer for each block of the second half, as in U-ViT (arXiv 2209.12152). The outputs of the
    first half, in reverse order, are then concatenated with the inputs of the second half, and each layer maps
    (N, H, W, 2C) to (N, H, W, C).
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
