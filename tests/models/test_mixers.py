"""Each mixer and channel attention in float64, against its formula written out pixel by pixel."""

import math

import pytest
import torch
from torch import nn

from dico_t2i.models.isotropic import in_a_row
from dico_t2i.models.mixers import (
    CHANNEL_ATTENTIONS,
    AgentAttention,
    ConvVariant,
    FocusedLinearAttention,
    SelfAttention,
    WindowAttention,
)

C, HEADS = 12, 3


def randomized(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.7)
    return module.double()


def image(*size, channels=C):
    return torch.randn(1, *size, channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def linear(layer, vector):
    return layer.weight @ vector + layer.bias


def softmax(scores):
    powers = [math.exp(s) for s in scores]
    return [p / sum(powers) for p in powers]


def in_heads(vector):
    return [vector[h * C // HEADS : (h + 1) * C // HEADS] for h in range(HEADS)]


def place(row, column):
    """Cosines, then sines of the row; the same of the column."""
    rates = [10000 ** (-k / (C // 4)) for k in range(C // 4)]
    return torch.tensor(
        [f(place * rate) for place in (row, column) for f in (math.cos, math.sin) for rate in rates],
        dtype=torch.float64,
    )


def attended(queries, keys, values, sees=lambda a, b: True):
    """Of vectors by their places: for each query the mean of the values that it sees, head by head."""
    out = {}
    for a, query in queries.items():
        seen = [b for b in keys if sees(a, b)]
        heads = []
        for h in range(HEADS):
            scores = [float(in_heads(query)[h] @ in_heads(keys[b])[h]) / math.sqrt(C / HEADS) for b in seen]
            weights = zip(softmax(scores), seen, strict=True)
            heads.append(sum(weight * in_heads(values[b])[h] for weight, b in weights))
        out[a] = torch.cat(heads)
    return out


def queries_keys_values(module, x, places=True):
    pixels = {(r, c): x[0, r, c] + (place(r, c) if places else 0) for r in range(x.shape[1]) for c in range(x.shape[2])}
    parts = {at: linear(module.qkv, pixel).chunk(3) for at, pixel in pixels.items()}
    return [{at: part[i] for at, part in parts.items()} for i in range(3)]


def depthwise(planes, weight, bias, at):
    """Of vectors by their places; 0 outside."""
    reach, total = weight.shape[-1] // 2, bias.clone()
    for i in range(-reach, reach + 1):
        for j in range(-reach, reach + 1):
            total += weight[:, 0, i + reach, j + reach] * planes.get((at[0] + i, at[1] + j), torch.zeros_like(bias))
    return total


def as_image(pixels, like):
    return torch.stack([pixels[r, c] for r in range(like.shape[1]) for c in range(like.shape[2])]).reshape(like.shape)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_attention_sees_every_pixel_and_knows_its_place():
    module, x = randomized(SelfAttention(C)), image(3, 4)
    mixed = attended(*queries_keys_values(module, x))
    close(module(x), as_image({at: linear(module.out, v) for at, v in mixed.items()}, x))


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 8), (10, 17), (3, 5), (9, 8)])
@pytest.mark.parametrize("shift", [0, 4])
def test_windows_stand_side_by_side_or_half_a_window_further(size, shift):
    """A window that would hang over the edge is cut off there."""
    module, x = randomized(WindowAttention(C, shifted=shift > 0)), image(*size)
    moves = [shift if length > 8 else 0 for length in size]

    def window(at):
        return [(place - move) // 8 for place, move in zip(at, moves, strict=True)]

    mixed = attended(*queries_keys_values(module, x), lambda a, b: window(a) == window(b))
    close(module(x), as_image({at: linear(module.out, v) for at, v in mixed.items()}, x))


@torch.no_grad()
def test_linear_attention_focuses_queries_and_keys():
    module, x = randomized(FocusedLinearAttention(C)), image(4, 6)
    queries, keys, values = queries_keys_values(module, x, places=False)

    def focus(vector):
        positive = vector.clamp(min=0) + 1e-6
        return positive**3 * positive.norm() / (positive**3).norm()

    out = {}
    for at, query in queries.items():
        heads = []
        for h in range(HEADS):
            likeness = {b: focus(in_heads(query)[h]) @ focus(in_heads(key)[h]) for b, key in keys.items()}
            total = sum(likeness.values())
            heads.append(sum(likeness[b] / total * in_heads(values[b])[h] for b in keys))
        out[at] = linear(module.out, torch.cat(heads) + depthwise(values, module.local.weight, module.local.bias, at))
    close(module(x), as_image(out, x))


@torch.no_grad()
@pytest.mark.parametrize("size", [(7, 14), (5, 9)])
def test_agents_gather_and_hand_out(size):
    module, x = randomized(AgentAttention(C)), image(*size)
    queries, keys, values = queries_keys_values(module, x, places=False)

    def part(number, length):
        return range(number * length // 7, -(-(number + 1) * length // 7))

    agents = {}
    for i in range(7):
        for j in range(7):
            inside = [queries[r, c] for r in part(i, size[0]) for c in part(j, size[1])]
            agents[i, j] = torch.stack(inside).mean(0)
    mixed = attended(queries, agents, attended(agents, keys, values))
    local = {at: depthwise(values, module.local.weight, module.local.bias, at) for at in values}
    close(module(x), as_image({at: linear(module.out, v + local[at]) for at, v in mixed.items()}, x))


def channel_attention(name, module, planes):
    """planes (H, W, C), after the activation."""
    mean = planes.mean((0, 1))
    if name == "compact":
        return planes * linear(module, mean).sigmoid()
    if name == "se":
        return planes * linear(module.excite, linear(module.squeeze, mean).clamp(min=0)).sigmoid()
    if name == "none":
        return planes
    every = torch.einsum("oc,hwc->ohw", module.qkv.weight, planes) + module.qkv.bias[:, None, None]
    query, key, value = every.chunk(3)
    out = []
    for i in range(C):
        scores = [
            float(module.log_temperature.exp() * (query[i] * key[j]).sum() / query[i].norm() / key[j].norm())
            for j in range(C)
        ]
        out.append(sum(weight * value[j] for j, weight in enumerate(softmax(scores))))
    return torch.stack(out, dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("name", CHANNEL_ATTENTIONS)
@pytest.mark.parametrize(("kernel", "activation"), [(3, "gelu"), (5, "relu"), (7, "gelu")])
def test_the_conv_module_with_other_parts(name, kernel, activation):
    function = {"relu": lambda v: v.clamp(min=0), "gelu": lambda v: v * (1 + torch.erf(v / math.sqrt(2))) / 2}[
        activation
    ]
    module = randomized(ConvVariant(C, CHANNEL_ATTENTIONS[name](C), kernel, function))
    x = image(4, 5)
    planes = {(r, c): linear(module.expand, x[0, r, c]) for r in range(4) for c in range(5)}
    weights = (module.depthwise.weight, module.depthwise.bias)
    between = as_image({at: function(depthwise(planes, *weights, at)) for at in planes}, x)[0]
    scaled = channel_attention(name, module.attention, between)
    close(module(x)[0], scaled @ module.project.weight.T + module.project.bias)


GRADIENTS = {
    "attention": (SelfAttention(4), (2, 3)),
    "window": (WindowAttention(4, shifted=True), (2, 9)),
    "focused_linear": (FocusedLinearAttention(4), (2, 3)),
    "agent": (AgentAttention(4), (2, 8)),
    **{
        f"conv, {name}": (ConvVariant(4, make(4), 5, torch.nn.functional.gelu), (2, 3))
        for name, make in CHANNEL_ATTENTIONS.items()
    },
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name):
    module, size = GRADIENTS[name]
    x = image(*size, channels=4).requires_grad_()
    names, parameters = zip(*randomized(module).named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)


def test_long_skips_pair_the_first_block_with_the_last():
    """On numbers: blocks add 1, 10, ..., a skip's linear layer takes 2 x + 3 skip."""
    merges = nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(2))
    for merge in merges:
        nn.init.zeros_(merge.weight)
        merge.weight.data += torch.tensor([[2.0, 3.0]])
    steps = [lambda x, n=n: x + 10**n for n in range(5)]
    out = in_a_row(torch.zeros(1, 1, 1, 1), steps, merges)
    third = (1 + 10) + 100
    fourth = 2 * third + 3 * (1 + 10) + 1000
    assert out.item() == 2 * fourth + 3 * 1 + 10000
    assert in_a_row(torch.zeros(1, 1, 1, 1), steps, nn.ModuleList()).item() == 11111
