"""The inputs of the network besides the image: the timestep, through adaLN, and the tokens of a text."""

import math
from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SINUSOID_DIM = 256
SMALLEST = 3  # side of the text kernels that the operators are written for
REACH = 9  # tokens that a convolution along the text sees
HEAD_WIDTH = 16  # in the attention of a text's summary
QUERY_STD = 2.0  # of its logits at first, with tokens of unit variance: every head begins with a few kinds of words


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Timestep features: cosines, then sines, of t * 10000^(-k / (dim // 2)); a zero column if dim is odd.

    t (N,), possibly fractional -> (N, dim), in float64 if t is float64, else in float32.
    """
    half = dim // 2
    t = t.to(torch.promote_types(torch.float32, t.dtype))
    k = torch.arange(half, dtype=t.dtype, device=t.device)
    angles = t[:, None] * torch.exp(-math.log(10000) * k / half)
    return F.pad(torch.cat((angles.cos(), angles.sin()), dim=1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """A sinusoidal embedding followed by a two-layer MLP: (N,) -> (N, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(SINUSOID_DIM, width)
        self.out = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        dtype = self.hidden.weight.dtype
        # A float64 network gets float64 features; all others get float32 features, rounded at the end.
        features = sinusoid(t.to(torch.promote_types(torch.float32, dtype)), SINUSOID_DIM)
        return self.out(F.silu(self.hidden(features.to(dtype))))


def is_token(tokens: Tensor) -> Tensor:
    """Mark the real tokens: (N, T, dim) -> bool (N, T, 1), false for padding, which is all zeros."""
    return tokens.ne(0).any(-1, keepdim=True)


def padding_bias(tokens: Tensor) -> Tensor:
    """The bias that hides padding when it is added to the logits of attention: (N, T, dim) -> (N, T).

    It is finite, so that a text that consists of padding alone gives no NaN.
    """
    return 1e4 * (is_token(tokens)[..., 0].to(tokens.dtype) - 1)


class PooledText(NamedTuple):
    """A text pooled to the taps of a kernel, tap i of which is the mean of all tokens with the weights of row i.

    The two are kept apart for short texts, since a linear layer of a mean is the mean of the layer's results, and there
    are fewer tokens than taps.
    """

    tokens: Tensor  # (N, T, width)
    weights: Tensor  # (N, taps, T), or (N, k, k, T) of ``reachable``; their sums over T are 1


Text = Tensor | PooledText  # tokens, or their means


def apply_linear(layer: nn.Module, text: Text) -> Tensor:
    """A linear layer of tokens (N, ..., width), or of a pooled text's taps: (N, ..., D)."""
    if isinstance(text, Tensor):
        return layer(text)
    tokens, weights = text
    rows = weights.flatten(1, -2)
    taps = rows @ layer(tokens) if _is_short(tokens, rows.shape[1]) else layer(rows @ tokens)
    return taps.unflatten(1, weights.shape[1:-1])


def _is_short(tokens: Tensor, taps: int) -> bool:
    """Whether it is less work to take the means of a layer's results than to apply the layer to the means."""
    _, T, width = tokens.shape
    return T * (width + taps) < taps * width


@overload
def reachable(text: Tensor, kernel: int, size: Sequence[int]) -> Tensor: ...
@overload
def reachable(text: PooledText, kernel: int, size: Sequence[int]) -> PooledText: ...
def reachable(text: Text, kernel: int, size: Sequence[int]) -> Text:
    """The tokens of the taps that lead from one pixel of an image of ``size`` (H, W) to another.

    Tokens (N, T, C) are the taps of kernels of kernel x kernel, as in ``text_dwconv``. In an image of 4x4 pixels, only
    the 7x7 taps in the middle of a 9x9 kernel meet anything but padding, so that the others need not be computed.
    Returns (N, k, k, C) with the smaller k; or the text itself where every tap can meet a pixel, or which has that
    shape already.
    """
    if isinstance(text, PooledText):
        return PooledText(text.tokens, reachable(text.weights, kernel, size))
    side = min(kernel, max(SMALLEST, 2 * max(size) - 1))
    if text.ndim == 4 or side == kernel:
        return text
    repeated = text[:, -1:].expand(-1, kernel**2 - text.shape[1], -1)
    edge = (kernel - side) // 2
    taps = torch.cat((text, repeated), dim=1).unflatten(1, (kernel, kernel))
    return taps[:, edge:-edge, edge:-edge].contiguous()  # otherwise a linear layer adds its bias in a second pass


class TextInput(nn.Module):
    """Prepares the encoders' tokens for the blocks: one width, a look at their neighbours, and as many as taps.

    sizes: the number of tokens and the width of each encoder, in the order of the sequence; narrower tokens are padded
    with zeros to the widest. width: the width to which a linear layer for each encoder maps its tokens; None leaves
    them unchanged. layers: the number of convolutions along the text. taps: the number of tokens after pooling; None
    turns pooling off. masked: treat tokens of zeros as padding.
    """

    def __init__(
        self, sizes: Sequence[Sequence[int]], width: int | None, layers: int, taps: int | None, masked: bool
    ) -> None:
        super().__init__()
        self.sizes, self.masked = sizes, masked
        tokens_width = width or max(dim for _, dim in sizes)
        self.projections = nn.ModuleList(nn.Linear(dim, width) for _, dim in sizes) if width else None
        self.layers = nn.ModuleList(TextLayer(tokens_width) for _ in range(layers))
        self.pooling = TextPooling([count for count, _ in sizes], tokens_width, taps, masked) if taps else None

    def forward(self, tokens: Tensor) -> Text:
        """(N, T, widest) -> (N, T, width), where padding stays zero, or what pools them to the taps."""
        real = is_token(tokens) if self.masked else None
        if self.projections is not None:
            parts = tokens.split([count for count, _ in self.sizes], dim=1)
            sizes = zip(self.projections, parts, self.sizes, strict=True)
            tokens = torch.cat([project(part[..., :dim]) for project, part, (_, dim) in sizes], dim=1)
            tokens = tokens if real is None else tokens * real
        for layer in self.layers:
            tokens = layer(tokens) if real is None else layer(tokens) * real
        return tokens if self.pooling is None else self.pooling(tokens)


class TextLayer(nn.Module):
    """Tells each token about its neighbours: x + linear(GELU(depthwise convolution along the text(norm(x)))).

    The convolution sees 9 tokens: a word's own phrase, and the next one. It is the same for every place of a text, so
    that words that belong together are found wherever they are.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.along = nn.Conv2d(width, width, (1, REACH), padding=(0, REACH // 2), groups=width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> the same."""
        columns = _normalized(x).transpose(1, 2).unsqueeze(2)  # (N, width, 1, T): its memory is channels-last already
        return x + self.project(F.gelu(self.along(columns).squeeze(2).transpose(1, 2)))


class TextPooling(nn.Module):
    """Pools any number of tokens to the taps of a kernel: each tap has a learned query that attends to the sequence.

    Tap i is the mean of all tokens with weights softmax(query_i . key(token_t) / sqrt(width) + position_it). Initially
    each tap attends to the corresponding place in the text of each encoder, so that the taps follow the text in order,
    as they do without pooling. The weights have heavy tails, so that distant tokens get gradients, too.
    """

    def __init__(self, counts: Sequence[int], width: int, taps: int, masked: bool) -> None:
        super().__init__()
        self.counts, self.masked = counts, masked
        self.query = nn.Parameter(torch.empty(taps, width))
        self.key = nn.Linear(width, width, bias=False)
        self.position = nn.Parameter(torch.empty(taps, sum(counts)))

    def reset_position(self) -> None:
        """Set Cauchy weights around each tap's place, as wide as taps are apart; every encoder gets the same sum."""
        taps = len(self.position)
        parts = []
        for count in self.counts:
            place = torch.linspace(0, count - 1, taps, device="cpu")[:, None]
            distance = (torch.arange(count, device="cpu") - place) / max(1.0, (count - 1) / max(1, taps - 1))
            parts.append(torch.log_softmax(-torch.log1p(4 * distance.square()), dim=1))
        with torch.no_grad():
            self.position.copy_(torch.cat(parts, dim=1))

    def forward(self, tokens: Tensor) -> Text:
        """(N, T, width) -> (N, taps, width), or the two factors of that."""
        logits = self.query @ self.key(tokens).transpose(1, 2) / math.sqrt(tokens.shape[-1])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) + self.position
        if self.masked:
            logits = logits + padding_bias(tokens)[:, None]
        weights = torch.softmax(logits, dim=-1).to(tokens.dtype)
        return PooledText(tokens, weights) if _is_short(tokens, len(self.query)) else weights @ tokens


class TextSummary(nn.Module):
    """Summarizes a text of any length in one vector: learned queries with several heads gather its words.

    What is gathered, and the summary itself, are normalized, so that the text counts from the first step on, whatever
    the scale of the tokens. masked: tokens of zeros are padding and are left out.
    """

    def __init__(self, text_dim: int, queries: int, width: int, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.head_width = math.gcd(width, HEAD_WIDTH)
        self.query = nn.Parameter(torch.empty(queries, width))
        self.key_value = nn.Linear(text_dim, 2 * width)
        self.mix = nn.Linear(queries * width, width)

    def reset_query(self) -> None:
        nn.init.normal_(self.query, std=QUERY_STD)

    def forward(self, text: Text) -> Tensor:
        """Tokens (N, T, text_dim) -> (N, width): norm(SiLU(mix(norm of what each query gathers)))."""
        both = apply_linear(self.key_value, text)
        key, value = both.unflatten(2, (2, -1, self.head_width)).permute(2, 0, 3, 1, 4)
        query = self.query.to(key.dtype).unflatten(1, (-1, self.head_width)).transpose(0, 1)
        query = query.expand(len(key), -1, -1, -1)
        mask = None
        if self.masked and isinstance(text, Tensor):  # the taps of a pooled text are no padding
            mask = padding_bias(text)[:, None, None].to(key.dtype)
        gathered = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        return _normalized(F.silu(self.mix(_normalized(gathered).flatten(1))))


def _normalized(x: Tensor) -> Tensor:
    """The last dimension with mean 0 and variance 1."""
    return F.layer_norm(x, x.shape[-1:])
