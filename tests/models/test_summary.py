"""The learned summary of a text, the convolutions along it, and networks with both."""

import math

import pytest
import torch
from pydantic import ValidationError

from dico_t2i.models import DiCo, DiCoConfig, count_macs
from dico_t2i.models.conditioning import TextInput, TextSummary
from tests.models.test_dico import SMALL, randomized

SUMMARY = {"condition": "text", "text_dim": 12, "text_summary": 5, "text_summary_width": 8}
NETWORKS = {
    "kernels": {"time_init": "xavier"},
    "kernels of a stage": {"text_projection": "stage", "text_mask": True},
    "cross-attention": {"text_fusion": "cross_attention", "text_mask": True},
    "long texts": {"text_tokens": 120, "text_pooling": "attention"},
    "layers": {"text_layers": 2},
    "layers without padding": {"text_layers": 1, "text_mask": True},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fresh_network_says_zero_and_then_everything_is_trained(name):
    config = DiCoConfig(**SMALL, **SUMMARY, **NETWORKS[name])
    x, t, tokens = torch.randn(2, 4, 8, 12), torch.tensor([3, 800]), torch.randn(2, config.text_tokens, 12)
    assert not DiCo(config)(x, t, tokens).any()
    model = randomized(config)
    out = model(x, t, tokens)
    out.square().mean().backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []
    torch.testing.assert_close(model(x, t, model.text_kernels(tokens)), out)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, t, tokens)
    assert (half - out).abs().mean() < 0.05 * out.abs().mean()


@pytest.mark.parametrize("masked", [False, True])
def test_a_summary_is_its_formula_and_its_gradients_those_of_finite_differences(masked):
    torch.manual_seed(0)
    module = TextSummary(6, 3, 32, masked).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    tokens = torch.randn(2, 9, 6, dtype=torch.float64)
    tokens[0, 7:] = 0
    keys, values = module.key_value(tokens).chunk(2, dim=-1)
    gathered = torch.zeros(2, 3, 32, dtype=torch.float64)
    for n, length in enumerate((7, 9) if masked else (9, 9)):
        for head in (slice(0, 16), slice(16, 32)):
            logits = module.query[:, head] @ keys[n, :length, head].T / math.sqrt(16)
            gathered[n, :, head] = logits.softmax(-1) @ values[n, :length, head]
    mixed = torch.nn.functional.silu(module.mix(normalized(gathered).reshape(2, -1)))
    torch.testing.assert_close(module(tokens), normalized(mixed))
    inputs = (tokens.requires_grad_(not masked), *module.parameters())  # masking jumps where a token is 0
    assert torch.autograd.gradcheck(lambda tokens, *_: module(tokens), inputs, fast_mode=True)


@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_is_its_formula_and_its_gradients_those_of_finite_differences(masked):
    torch.manual_seed(0)
    module = TextInput(((11, 6),), width=None, layers=1, taps=None, masked=masked).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    tokens = torch.randn(2, 11, 6, dtype=torch.float64)
    tokens[0, 7:] = 0
    (layer,) = module.layers
    around = torch.nn.functional.pad(normalized(tokens), (0, 0, 4, 4))
    taps = layer.along.weight[:, 0, 0]  # (width, 9)
    seen = torch.stack([(around[:, i : i + 9] * taps.T).sum(1) for i in range(11)], 1) + layer.along.bias
    expected = tokens + layer.project(torch.nn.functional.gelu(seen))
    if masked:
        expected[0, 7:] = 0
    torch.testing.assert_close(module(tokens), expected)
    inputs = (tokens.requires_grad_(not masked), *module.parameters())
    assert torch.autograd.gradcheck(lambda tokens, *_: module(tokens), inputs, fast_mode=True)


def normalized(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def test_the_embedding_of_the_timestep_starts_as_the_config_says():
    small, xavier = (DiCo(DiCoConfig(**SMALL, time_init=start)).time_embeddings[0].out for start in ("small", "xavier"))
    assert small.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert xavier.weight.std().item() == pytest.approx(math.sqrt(2 / sum(xavier.weight.shape)), rel=0.2)


def test_work_is_counted():
    """Keys and values of 77 tokens, the attention of one query, its part of the mix, and three embeddings."""
    shared = {"variant": "DiCo-S", "condition": "text", "text_summary_width": 256}
    none, one, two = (
        count_macs(
            DiCoConfig(**(shared if n else {**shared, "text_summary_width": None}), text_summary=n), (1, 4, 32, 32)
        )
        for n in range(3)
    )
    query = 2 * 77 * 256 + 256**2
    assert two - one == query
    assert one - none == 77 * 768 * 512 + query + 256 * (128 + 256 + 512)


def test_the_work_of_a_layer_is_counted():
    """Nine taps of each channel and a linear layer, for each of 77 tokens."""
    none, one = (
        count_macs(DiCoConfig(variant="DiCo-S", condition="text", text_layers=n), (1, 4, 32, 32)) for n in (0, 1)
    )
    assert one - none == 77 * (9 * 768 + 768**2)


def test_a_width_without_a_summary_is_named():
    with pytest.raises(ValidationError, match="text_summary_width: it is for a summary"):
        DiCoConfig(**SMALL, condition="text", text_summary_width=8)
