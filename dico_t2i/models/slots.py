"""Text as a few slots: learned queries gather the words, and every pixel chooses the slots that modulate it.

Gathering depends on the text alone, so sampling does it once per prompt. Nothing here attends from pixel to pixel or
from pixel to word: the choice of a pixel is a 1x1 convolution of its own features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dico_t2i.models.conditioning import TimestepEmbedding, padding_bias

HEAD_WIDTH = 16
QUERY_STD = 2.0  # of the logits at first, with tokens of unit variance: every head begins with a few kinds of words


class TextSlots(nn.Module):
    """Gathers any number of tokens into ``slots`` vectors of ``width``, and tells each of the whole text and the time.

    Each slot has a learned query with several heads, so that one slot can hold several words. Slots and their summary
    are normalized, so that text counts from the first step on, whatever the scale of the tokens. masked: tokens of
    zeros are padding and are left out.
    """

    def __init__(self, text_dim: int, slots: int, width: int, masked: bool = False) -> None:
        super().__init__()
        self.masked = masked
        self.head_width = math.gcd(width, HEAD_WIDTH)
        self.query = nn.Parameter(torch.empty(slots, width))
        self.key_value = nn.Linear(text_dim, 2 * width)
        self.summary = nn.Linear(slots * width, width)
        self.time = TimestepEmbedding(width)
        self.hidden = nn.Linear(width, width)
        self.hidden_of_all = nn.Linear(width, width, bias=False)
        self.mixed = nn.Linear(width, width)

    def reset_query(self) -> None:
        nn.init.normal_(self.query, std=QUERY_STD)

    def gather(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, text_dim) -> slots (N, slots, width) and their summary (N, width)."""
        slots = normalized(self._gather(tokens))
        return slots, normalized(F.silu(self.summary(slots.flatten(1))))

    def forward(self, slots: Tensor, summary: Tensor, t: Tensor) -> Tensor:
        """Slots (N, slots, width) plus an MLP of themselves, the summary and the timesteps t (N,)."""
        told = self.hidden_of_all(summary) + self.time(t)
        return slots + self.mixed(F.gelu(self.hidden(slots) + told[:, None]))

    def _gather(self, tokens: Tensor) -> Tensor:
        N, T, _ = tokens.shape
        key, value = self.key_value(tokens).reshape(N, T, 2, -1, self.head_width).permute(2, 0, 3, 1, 4)
        query = self.query.to(key.dtype).unflatten(1, (-1, self.head_width)).transpose(0, 1).expand(N, -1, -1, -1)
        mask = padding_bias(tokens)[:, None, None].to(key.dtype) if self.masked else None
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


class RoutedModulation(nn.Module):
    """Scales and shifts each pixel by what the slots that it chooses say: x * scale + shift.

    The weights of a pixel are softmax(route(x)). The layer that makes the scales and shifts starts at zero.
    """

    def __init__(self, width: int, slots: int, channels: int) -> None:
        super().__init__()
        self.route = nn.Linear(channels, slots)
        self.out = nn.Linear(width, 2 * channels)

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        """x (N, H, W, C), slots (N, slots, width) -> (N, H, W, C)."""
        said = self.out(slots)
        weights = self.route(x).softmax(-1).to(said.dtype).flatten(1, 2)
        # Two products, since only the scales are kept for the gradient.
        scale, shift = ((weights @ part).view(x.shape) for part in said.chunk(2, dim=-1))
        return torch.addcmul(shift, x, scale)


def normalized(x: Tensor) -> Tensor:
    """The last dimension with mean 0 and variance 1."""
    return F.layer_norm(x, x.shape[-1:])
