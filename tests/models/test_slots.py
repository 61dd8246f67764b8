"""Text slots, the modulation that pixels choose among them, and networks that use them."""

import math

import pytest
import torch
from pydantic import ValidationError

from dico_t2i.models import DiCo, DiCoConfig, count_macs
from dico_t2i.models.slots import RoutedModulation, TextSlots
from tests.models.test_dico import SMALL, randomized

JOINT = {"condition": "text", "text_dim": 12, "text_fusion": "joint", "text_slots": 5, "text_slot_width": 8}
NETWORKS = {
    "joint": {},
    "masked": {"text_mask": True, "time_init": "xavier"},
    "long texts": {"text_tokens": 120, "text_pooling": "attention"},
    "isotropic": {"layout": "isotropic"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fresh_network_says_zero_and_then_everything_is_trained(name):
    config = DiCoConfig(**SMALL, **JOINT, **NETWORKS[name])
    x, t, tokens = torch.randn(2, 4, 8, 12), torch.tensor([3, 800]), torch.randn(2, config.text_tokens, 12)
    assert not DiCo(config)(x, t, tokens).any()
    model = randomized(config)
    out = model(x, t, tokens)
    assert not torch.allclose(out, model(x, t, tokens.flip(0)))
    out.square().mean().backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []
    torch.testing.assert_close(model(x, t, model.text_kernels(tokens)), out)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, t, tokens)
    assert (half - out).abs().mean() < 0.05 * out.abs().mean()


def random_module(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module.double()


def normalized(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("masked", [False, True])
def test_slots_are_their_formula_and_their_gradients_those_of_finite_differences(masked):
    torch.manual_seed(0)
    module = random_module(TextSlots(6, 3, 32, masked))
    tokens, t = torch.randn(2, 9, 6, dtype=torch.float64), torch.tensor([3.0, 700.0], dtype=torch.float64)
    tokens[0, 7:] = 0
    keys, values = module.key_value(tokens).chunk(2, dim=-1)
    gathered = torch.zeros(2, 3, 32, dtype=torch.float64)
    for n, length in enumerate((7, 9) if masked else (9, 9)):
        for head in (slice(0, 16), slice(16, 32)):
            logits = module.query[:, head] @ keys[n, :length, head].T / math.sqrt(16)
            gathered[n, :, head] = logits.softmax(-1) @ values[n, :length, head]
    slots, summary = module.gather(tokens)
    torch.testing.assert_close(slots, normalized(gathered))
    torch.testing.assert_close(summary, normalized(torch.nn.functional.silu(module.summary(slots.flatten(1)))))
    told = module(slots, summary, t)
    for n in range(2):
        for slot in range(3):
            hidden = module.hidden(slots[n, slot]) + module.hidden_of_all.weight @ summary[n] + module.time(t)[n]
            expected = slots[n, slot] + module.mixed(torch.nn.functional.gelu(hidden))
            torch.testing.assert_close(told[n, slot], expected)
    inputs = (tokens.requires_grad_(not masked), *module.parameters())  # masking jumps where a token is 0
    assert torch.autograd.gradcheck(lambda tokens, *_: module(*module.gather(tokens), t), inputs, fast_mode=True)


def test_each_pixel_is_modulated_by_the_slots_it_chooses():
    torch.manual_seed(0)
    module = random_module(RoutedModulation(6, 3, 4))
    x, slots = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    expected = torch.empty_like(x)
    for n in range(2):
        scale, shift = module.out(slots[n]).chunk(2, dim=-1)
        for i in range(3):
            for j in range(5):
                weights = module.route(x[n, i, j]).softmax(-1)
                expected[n, i, j] = x[n, i, j] * (weights @ scale) + weights @ shift
    torch.testing.assert_close(module(x, slots), expected)
    inputs = (x.requires_grad_(), slots.requires_grad_(), *module.parameters())
    assert torch.autograd.gradcheck(lambda x, slots, *_: module(x, slots), inputs, fast_mode=True)


def test_work_is_counted():
    """The slots once, and in each block outside the middle the layer of the slots, the choice and the means."""
    shared = {"variant": "DiCo-S", "condition": "text", "text_fusion": "joint", "text_slot_width": 256}
    slots, more = (count_macs(DiCoConfig(**shared, text_slots=count), (1, 4, 32, 32)) for count in (16, 17))
    widths = [(128, 5, 1024), (256, 4, 256), (256, 4, 256), (256, 4, 1024)]  # with depths and pixels
    blocks = sum(d * (256 * 2 * c + p * 3 * c) for c, d, p in widths)
    gathering = 2 * 77 * 256 + 3 * 256**2  # attention; of the summary and of the mixing
    assert more - slots == blocks + gathering


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_slots": 4}, "text_slots: it is for text_fusion: joint"),
        ({"text_slot_width": 4}, "text_slot_width: it is for text_fusion: joint"),
        ({"text_fusion": "joint", "text_projection": "stage"}, "text_projection: stage is for text_fusion: dwc"),
        ({"text_fusion": "joint", "text_tokens": 90}, "90 tokens do not fit a 9x9 kernel; at most 81 with text_fusion"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValidationError, match=message):
        DiCoConfig(**SMALL, condition="text", **options)
