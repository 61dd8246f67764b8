"""Text as a few slots: learned queries gather the words, and every pixel chooses the slots that modulate it.

The slots depend on the text alone, so sampling makes them once per prompt. Nothing here attends from pixel to pixel or
from pixel to word: the choice of a pixel is a 1x1 convolution of its own features and of its place.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dico_t2i.models.blocks import TextKernel
from dico_t2i.models.conditioning import padding_bias

HEAD_WIDTH = 16
WAVES = 8  # cosines that tell a pixel where it is, half of them along each axis
QUERY_STD = 2.0  # of the logits at first, with tokens of unit variance: every head begins with a few kinds of words


class TextSlots(nn.Module):
    """Gathers any number of tokens into ``slots`` vectors of ``width``, and makes a summary of all of them.

    Each slot has a learned query with several heads, so that one slot can hold several words. masked: tokens of zeros
    are padding and are left out.
    """

    def __init__(self, text_dim: int, slots: int, width: int, masked: bool = False) -> None:
        super().__init__()
        self.masked = masked
        self.head_width = math.gcd(width, HEAD_WIDTH)
        self.query = nn.Parameter(torch.empty(slots, width))
        self.key_value = nn.Linear(text_dim, 2 * width)
        self.summary = nn.Linear(slots * width, width)

    def reset_query(self) -> None:
        nn.init.normal_(self.query, std=QUERY_STD)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, text_dim) -> slots (N, slots, width) and summary (N, width)."""
        N, T, _ = tokens.shape
        key, value = self.key_value(tokens).reshape(N, T, 2, -1, self.head_width).permute(2, 0, 3, 1, 4)
        query = self.query.to(key.dtype).unflatten(1, (-1, self.head_width)).transpose(0, 1).expand(N, -1, -1, -1)
        mask = padding_bias(tokens)[:, None, None].to(key.dtype) if self.masked else None
        slots = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        return slots, F.silu(self.summary(slots.flatten(1)))


class SlotMixing(nn.Module):
    """An MLP that tells every slot of the whole text: slot + MLP(slot, summary)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.hidden_of_all = nn.Linear(width, width, bias=False)
        self.mixed = nn.Linear(width, width)

    def forward(self, slots: Tensor, summary: Tensor) -> Tensor:
        """slots (N, slots, width), summary (N, width) -> (N, slots, width)."""
        return slots + self.mixed(F.gelu(self.hidden(slots) + self.hidden_of_all(summary)[:, None]))


class RoutedModulation(nn.Module):
    """Scales and shifts each pixel by what the slots say for it: x * scale + shift.

    Some slots are chosen: a pixel takes their mean under weights softmax(route(x) + place(p)), where p is its place.
    The last slots belong to the waves of ``place_waves``, which are their weights, so that they paint smooth layouts.
    The layer that makes the scales and shifts starts at zero.
    """

    def __init__(self, slot_width: int, chosen: int, channels: int) -> None:
        super().__init__()
        self.route = nn.Linear(channels, chosen)
        self.place = nn.Linear(WAVES, chosen, bias=False)
        self.out = nn.Linear(slot_width, 2 * channels)

    def kernel(self, slots: Tensor) -> TextKernel:
        return TextKernel(self.out(slots))

    def forward(self, x: Tensor, text: Tensor | TextKernel) -> Tensor:
        """x (N, H, W, C), text: slots (N, chosen + WAVES, width) or their TextKernel -> (N, H, W, C)."""
        value = (text if isinstance(text, TextKernel) else self.kernel(text)).value
        waves = place_waves(x)
        chosen = (self.route(x) + self.place(waves)).softmax(-1).to(value.dtype)
        weights = torch.cat((chosen, waves.to(value.dtype).expand(len(x), -1, -1, -1)), dim=-1).flatten(1, 2)
        scale, shift = ((weights @ part).view(x.shape) for part in value.chunk(2, dim=-1))
        return x * scale + shift


def place_waves(x: Tensor) -> Tensor:
    """The place of each pixel of x (N, H, W, C) as cosines along both axes, (H, W, WAVES).

    Wave k is cos(pi k u), where u runs from 0 to 1 across the image, whatever its size.
    """
    H, W = x.shape[1:3]
    dtype = torch.promote_types(x.dtype, torch.float32)
    number = torch.arange(1, WAVES // 2 + 1, device=x.device)
    down, across = (
        torch.cos(math.pi * ((torch.arange(size, device=x.device, dtype=dtype) + 0.5) / size)[:, None] * number)
        for size in (H, W)
    )
    return torch.cat((down[:, None].expand(-1, W, -1), across.expand(H, -1, -1)), dim=-1).to(x.dtype)
