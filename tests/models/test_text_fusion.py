"""Text beyond the paper's 77 tokens: kernels of other sides, pooling, several encoders."""

import math

import pytest
import torch
from pydantic import ValidationError

from dico_t2i.models import DiCo, DiCoConfig, blocks, count_macs, dico
from dico_t2i.models.blocks import CrossAttention
from dico_t2i.models.conditioning import PooledText, TextInput, TextPooling, apply_linear, reachable
from dico_t2i.ops import text_dwconv
from tests.models.test_dico import SMALL, randomized

POOLED = {"text_pooling": "attention"}
SEVERAL = {"text_dim": 12, "text_tokens": 30, "text_inputs": ((10, 8), (20, 12)), "text_inputs_width": 6}
NETWORKS = {
    "k5": {"text_dim": 12, "text_kernel": 5, **POOLED},
    "k7": {"text_dim": 12, "text_kernel": 7, "text_projection": "stage", **POOLED},
    "k11": {"text_dim": 12, "text_kernel": 11},
    "several": {**SEVERAL, "text_kernel": 5, "text_mask": True, **POOLED},
    "several, not pooled": {**SEVERAL, "text_mask": True},
    "several, cross-attention": {**SEVERAL, "text_fusion": "cross_attention", "text_mask": True},
}


def made(name):
    return DiCoConfig(**SMALL, condition="text", **NETWORKS[name])


def inputs(config, batch=2):
    """x, t and tokens; of several encoders the first is narrower, and the second's texts are of 7 and 20 tokens."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 8, 12, generator=generator)
    tokens = torch.randn(batch, config.text_tokens, config.text_dim, generator=generator)
    if config.text_inputs:
        tokens[:, :10, 8:] = 0
        tokens[0, 17:] = 0
    return x, torch.tensor([3, 800])[:batch], tokens


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fresh_network_says_zero_and_then_everything_is_trained(name):
    config = made(name)
    x, t, tokens = inputs(config)
    assert not DiCo(config)(x, t, tokens).any()
    model = randomized(config)
    out = model(x, t, tokens)
    assert out.shape == (2, 8, 8, 12)
    assert not torch.allclose(out, model(x, t, tokens.flip(0)))
    out.square().mean().backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # softmax does not see a constant added to all keys
    assert [n for n in untouched if not n.endswith("key_value.bias")] == []
    torch.testing.assert_close(model(x, t, model.text_kernels(tokens)), out)


@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_is_near_and_trains(name):
    config = made(name)
    x, t, tokens = inputs(config)
    model = randomized(config)
    expected = model(x, t, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(x, t, tokens)
    autocast.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    half = model.bfloat16()(x.bfloat16(), t, tokens.bfloat16())
    for out in (autocast, half):
        assert (out - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_one_encoder_and_no_pooling_are_the_network_of_the_paper():
    """The same parameters, and from a seed the same numbers, whatever is said of what is not there."""
    torch.manual_seed(0)
    plain = DiCo(DiCoConfig(**SMALL, condition="text", text_dim=12))
    torch.manual_seed(0)
    told = DiCo(DiCoConfig(**SMALL, condition="text", text_dim=12, text_kernel=9, text_pooling="none"))
    assert not [name for name in plain.state_dict() if name.startswith("text_input")]
    for (name, a), (other, b) in zip(plain.state_dict().items(), told.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)


def pooling(counts=(5, 8), width=6, taps=25, masked=False):
    torch.manual_seed(0)
    made = TextPooling(counts, width, taps, masked).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return made


def taps(text):
    """The taps (N, taps, width) of a text that was pooled."""
    return text if isinstance(text, torch.Tensor) else text.weights @ text.tokens


@pytest.mark.parametrize("masked", [False, True])
def test_pooling_is_its_formula(masked):
    module = pooling(masked=masked)
    tokens = torch.randn(2, 13, 6, dtype=torch.float64)
    tokens[0, 9:], tokens[1, 12:] = 0, 0
    key, query, position = (p.detach() for p in (module.key.weight, module.query, module.position))
    expected = torch.zeros(2, 25, 6, dtype=torch.float64)
    for n, length in enumerate((9, 12) if masked else (13, 13)):
        for i in range(25):
            keys = [key @ tokens[n, t] for t in range(length)]
            logits = [float(query[i] @ k) / math.sqrt(6) + float(position[i, t]) for t, k in enumerate(keys)]
            total = sum(math.exp(logit) for logit in logits)
            for t, logit in enumerate(logits):
                expected[n, i] += math.exp(logit) / total * tokens[n, t]
    torch.testing.assert_close(taps(module(tokens)), expected, rtol=1e-12, atol=1e-12)


def test_poolings_gradients_are_those_of_finite_differences():
    module = pooling(taps=9)
    tokens = torch.randn(1, 13, 6, dtype=torch.float64, requires_grad=True)
    parameters = tuple(module.parameters())
    assert torch.autograd.gradcheck(lambda *a: taps(module(a[0])), (tokens, *parameters), fast_mode=True)


@pytest.mark.parametrize("size", [(8, 8), (2, 3)], ids=str)
@pytest.mark.parametrize(("count", "factors"), [(4, True), (24, True), (77, False), (90, False)])
def test_a_linear_layer_of_a_pooled_text_is_that_of_its_taps(count, factors, size):
    """Whether the layer comes before the mean or after it, which depends on the numbers of tokens and taps."""
    torch.manual_seed(0)
    layer, tokens = torch.nn.Linear(40, 5).double(), torch.randn(2, count, 40, dtype=torch.float64)
    text = pooling(counts=(count,), width=40, taps=81)(tokens)
    assert isinstance(text, PooledText) == factors
    expected = reachable(layer(taps(text)), 9, size)
    torch.testing.assert_close(apply_linear(layer, reachable(text, 9, size)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 3), (4, 2), (4, 4), (5, 1), (8, 8)], ids=str)
@pytest.mark.parametrize("kernel", [5, 9])
@pytest.mark.parametrize("count", [1, 7, 20, 25])
def test_taps_that_meet_nothing_but_padding_are_left_out(count, kernel, size):
    """And no other: without the outermost of those that stay, the result is another one."""
    torch.manual_seed(0)
    x, tokens = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(2, count, 3, dtype=torch.float64)
    expected = text_dwconv(x, tokens, kernel)
    kept = reachable(tokens, kernel, size)
    if 2 * max(size) - 1 >= kernel:
        assert kept is tokens
        return
    side = kept.shape[1]
    assert side == max(3, 2 * max(size) - 1)
    torch.testing.assert_close(text_dwconv(x, kept.flatten(1, 2), side), expected, rtol=1e-12, atol=1e-12)
    if max(size) > 1:
        fewer = kept[:, 1:-1, 1:-1].flatten(1, 2)
        assert (text_dwconv(x, fewer, side - 2) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("switches", [{}, {"text_projection": "stage"}, {"layout": "isotropic"}], ids=str)
@pytest.mark.parametrize("pooled", [{}, {"text_pooling": "attention"}], ids=["tokens", "pooled"])
def test_a_network_computes_all_taps_that_count(switches, pooled, monkeypatch):
    """On latents of 8x8, 4x4 and 2x2 its output and gradients are those with all 81 taps."""
    config = DiCoConfig(**SMALL, condition="text", text_dim=12, text_tokens=8, **pooled, **switches)
    model = randomized(config).double()
    x, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([3, 800])
    tokens = torch.randn(2, 8, 12, dtype=torch.float64)

    def found():
        model.zero_grad()
        out = model(x, t, tokens)
        out.square().mean().backward()
        return [out.detach(), model(x, t, model.text_kernels(tokens)), *(p.grad for p in model.parameters())]

    with monkeypatch.context() as patched:
        for module in (blocks, dico):
            patched.setattr(module, "reachable", lambda text, kernel, size: text)
        expected = found()
    for mine, all_taps in zip(found(), expected, strict=True):
        torch.testing.assert_close(mine, all_taps, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("side", [5, 7, 9, 11])
def test_pooling_starts_as_the_text_in_its_order(side):
    """Each tap looks at its own place in the text of each encoder, most of all, and each encoder has the same share."""
    counts = (77, 256)
    module = TextPooling(counts, 8, side**2, False)
    module.reset_position()
    weights = module.position.softmax(1)
    for part, count in zip(weights.split(counts, dim=1), counts, strict=True):
        torch.testing.assert_close(part.sum(1), torch.full((side**2,), 0.5))
        places = torch.linspace(0, count - 1, side**2)
        assert ((part.argmax(1) - places).abs() <= 0.5).all()
    alone = TextPooling((81,), 8, 81, False)
    alone.reset_position()
    assert (alone.position.softmax(1).diagonal() > 0.5).all()
    assert alone.position.softmax(1).min() > 1e-5  # everything is in reach of a gradient


def test_each_encoder_has_its_own_layer():
    """A narrower encoder's padding up to the widest is not looked at; padded tokens stay zeros."""
    torch.manual_seed(0)
    module = TextInput(((4, 3), (5, 7)), width=6, layers=0, taps=None, masked=True)
    tokens = torch.randn(2, 9, 7)
    tokens[:, :4, 3:], tokens[:, 7:] = 0, 0
    out = module(tokens)
    first, second = module.projections
    torch.testing.assert_close(out[:, :4], first(tokens[:, :4, :3]))
    torch.testing.assert_close(out[:, 4:7], second(tokens[:, 4:7]))
    assert not out[:, 7:].any()
    tokens[:, :4, 3:] = 9
    assert torch.equal(module(tokens), out)


def test_cross_attention_leaves_padding_out():
    torch.manual_seed(0)
    module, plain = CrossAttention(6, 16, masked=True), CrossAttention(6, 16)
    plain.load_state_dict(module.state_dict())
    x, tokens = torch.randn(1, 4, 4, 16), torch.randn(1, 9, 6)
    tokens[:, 5:] = 0
    expected = plain(x, tokens[:, :5])
    torch.testing.assert_close(module(x, tokens), expected)
    torch.testing.assert_close(module(x, module.kernel(tokens)), expected)
    assert not torch.allclose(plain(x, tokens), expected)
    assert module(x, torch.zeros_like(tokens)).isfinite().all()


def test_work_is_counted():
    """Of the kernels themselves, of the blocks' projections, and of pooling."""
    plain, small = (
        count_macs(
            DiCoConfig(variant="DiCo-S", condition="text", text_kernel=k, text_pooling="attention"), (1, 4, 32, 32)
        )
        for k in (9, 5)
    )
    widths = [(128, 5), (256, 4), (512, 4), (256, 4), (256, 4)]  # of DiCo-S, with depths
    pixels = [1024, 256, 64, 256, 1024]
    convolutions = sum(c * d * p for (c, d), p in zip(widths, pixels, strict=True))
    projections = sum(d * (768 * c + c * c) for c, d in widths)
    expected = (81 - 25) * (convolutions + projections + 2 * 77 * 768)
    assert plain - small == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_kernel": 7}, "77 tokens do not fit a 7x7 kernel; at most 49"),
        ({"text_tokens": 82}, "82 tokens do not fit a 9x9 kernel"),
        ({"text_fusion": "cross_attention", **POOLED}, "text_pooling: it is for text_fusion: dwc"),
        ({"text_fusion": "cross_attention", "text_projection": "stage"}, "text_projection: it is for text_fusion: dwc"),
        ({"text_fusion": "cross_attention", "text_kernel": 7}, "text_kernel: it is for text_fusion: dwc"),
        ({"text_mask": True}, "text_mask: it has no effect on kernels that are made directly from the tokens"),
        ({**SEVERAL, "text_tokens": 31}, "text_tokens: 31, but text_inputs amount to 30"),
        ({**SEVERAL, "text_dim": 8}, "text_dim: 8, but text_inputs amount to 12"),
        ({"text_inputs_width": 8}, "is for several encoders"),
        ({"text_kernel": 6}, "Input should be 5, 7, 9 or 11"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValidationError, match=message):
        DiCoConfig(**SMALL, condition="text", **options)
