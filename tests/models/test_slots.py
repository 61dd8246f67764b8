"""Text slots, the modulation that pixels choose among them, and networks that use them."""

import math

import pytest
import torch
from pydantic import ValidationError

from dico_t2i.models import DiCo, DiCoConfig, count_macs
from dico_t2i.models.slots import RoutedModulation, SlotMixing, TextSlots, place_waves
from tests.models.test_dico import SMALL, randomized

SLOTS = {"text_dim": 12, "text_slots": 5, "text_slot_width": 8}
NETWORKS = {
    "routed": {**SLOTS, "text_fusion": "routed"},
    "routed, summary": {**SLOTS, "text_fusion": "routed", "text_summary": True, "text_mask": True},
    "summary alone": {**SLOTS, "text_fusion": "none", "text_summary": True},
    "kernels, summary": {**SLOTS, "text_summary": True, "text_projection": "stage", "text_stages": ("middle",)},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fresh_network_says_zero_and_then_everything_is_trained(name):
    config = DiCoConfig(**SMALL, condition="text", **NETWORKS[name])
    x, t, tokens = torch.randn(2, 4, 8, 12), torch.tensor([3, 800]), torch.randn(2, 77, 12)
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


@pytest.mark.parametrize("masked", [False, True])
def test_slots_are_their_formula_and_their_gradients_those_of_finite_differences(masked):
    torch.manual_seed(0)
    module = random_module(TextSlots(6, 3, 32, masked))
    tokens = torch.randn(2, 9, 6, dtype=torch.float64)
    tokens[0, 7:] = 0
    keys, values = module.key_value(tokens).chunk(2, dim=-1)
    gathered = torch.zeros(2, 3, 32, dtype=torch.float64)
    for n, length in enumerate((7, 9) if masked else (9, 9)):
        for head in (slice(0, 16), slice(16, 32)):
            logits = module.query[:, head] @ keys[n, :length, head].T / math.sqrt(16)
            gathered[n, :, head] = logits.softmax(-1) @ values[n, :length, head]
    slots, summary = module(tokens)
    torch.testing.assert_close(slots, gathered)
    torch.testing.assert_close(summary, torch.nn.functional.silu(module.summary(gathered.reshape(2, -1))))
    inputs = (tokens.requires_grad_(not masked), *module.parameters())  # masking jumps where a token is 0
    assert torch.autograd.gradcheck(lambda tokens, *_: module(tokens), inputs, fast_mode=True)


def test_every_slot_is_told_of_the_whole_text():
    torch.manual_seed(0)
    module = random_module(SlotMixing(6))
    slots, summary = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    for n in range(2):
        for slot in range(3):
            hidden = module.hidden(slots[n, slot]) + module.hidden_of_all.weight @ summary[n]
            expected = slots[n, slot] + module.mixed(torch.nn.functional.gelu(hidden))
            torch.testing.assert_close(module(slots, summary)[n, slot], expected)
    inputs = (slots.requires_grad_(), summary.requires_grad_(), *module.parameters())
    assert torch.autograd.gradcheck(lambda slots, summary, *_: module(slots, summary), inputs, fast_mode=True)


def test_each_pixel_is_modulated_by_the_slots_it_chooses_and_those_of_the_waves():
    torch.manual_seed(0)
    module = random_module(RoutedModulation(6, 3, 4))
    x, slots = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 3 + 8, 6, dtype=torch.float64)
    expected = torch.empty_like(x)
    for n in range(2):
        scale, shift = module.out(slots[n]).chunk(2, dim=-1)
        for i in range(3):
            for j in range(5):
                place = [math.cos(math.pi * k * (i + 0.5) / 3) for k in range(1, 5)]
                place += [math.cos(math.pi * k * (j + 0.5) / 5) for k in range(1, 5)]
                waves = torch.tensor(place, dtype=torch.float64)
                chosen = (module.route(x[n, i, j]) + module.place(waves)).softmax(-1)
                weights = torch.cat((chosen, waves))
                expected[n, i, j] = x[n, i, j] * (weights @ scale) + weights @ shift
    torch.testing.assert_close(module(x, slots), expected)
    torch.testing.assert_close(module(x, module.kernel(slots)), expected)
    inputs = (x.requires_grad_(), slots.requires_grad_(), *module.parameters())
    assert torch.autograd.gradcheck(lambda x, slots, *_: module(x, slots), inputs, fast_mode=True)


def test_places_do_not_depend_on_the_size_of_the_image():
    small, large = place_waves(torch.zeros(1, 4, 4, 1)), place_waves(torch.zeros(1, 12, 12, 1))
    torch.testing.assert_close(large[1::3, 1::3], small)  # the middles of 3x3 pixels


def test_work_is_counted():
    """The slots once, and in each block the layer of the slots, the choice and the means."""
    shared = {"variant": "DiCo-S", "condition": "text", "text_slot_width": 256}
    slots, more = (
        count_macs(DiCoConfig(**shared, text_fusion="routed", text_slots=count), (1, 4, 32, 32)) for count in (16, 17)
    )
    widths = [(128, 5, 1024), (256, 4, 256), (512, 4, 64), (256, 4, 256), (256, 4, 1024)]  # with depths and pixels
    blocks = sum(d * (256 * 2 * c + p * (3 * c + 8)) for c, d, p in widths)
    gathering = 2 * 77 * 256 + 3 * 256**2  # attention; of the summary and of the mixing
    assert more - slots == blocks + gathering


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_slots": 4}, "text_slots: they are for text_fusion: routed and for text_summary"),
        ({"text_fusion": "routed", "text_kernel": 7}, "text_kernel: it is for text_fusion: dwc; routed takes any"),
        ({"text_fusion": "none", "text_projection": "stage"}, "text_projection: it is for text_fusion: dwc"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValidationError, match=message):
        DiCoConfig(**SMALL, condition="text", **options)


def test_a_summary_needs_text():
    with pytest.raises(ValidationError, match="text_summary: it needs condition: text"):
        DiCoConfig(**SMALL, text_summary=True)
