"""The switches of the paper's ablations: networks of every kind, and the configs of the paper's rows."""

import re
from pathlib import Path

import pytest
import torch

from dico_t2i.config import ablated, load_config
from dico_t2i.models import STAGES, DiCo, DiCoConfig, count_macs, count_parameters
from dico_t2i.models.official import load_official_state_dict
from dico_t2i.plan.trace import trace_training

ROOT = Path(__file__).resolve().parents[2]
ROWS = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))
DICO_S = count_parameters(DiCoConfig(variant="DiCo-S"))
SMALL = {"hidden_size": 32, "depths": (2, 1, 1, 1, 2), "mlp_ratio": 1.5, "num_classes": 5}
TEXT = {**SMALL, "condition": "text", "text_dim": 12}
SWITCHES = [
    {"layout": "isotropic"},
    {"layout": "isotropic_skips"},
    {"mixer": "attention"},
    {"mixer": "window"},
    {"mixer": "focused_linear"},
    {"mixer": "agent"},
    {"channel_attention": "se"},
    {"channel_attention": "self"},
    {"channel_attention": "none"},
    {"depthwise_kernel": 5},
    {"depthwise_kernel": 7},
    {"activation": "relu"},
    {"layout": "isotropic_skips", "mixer": "window", "activation": "relu"},
]
EVERY = pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: " ".join(map(str, switches.values())))


def randomized(config):
    torch.manual_seed(0)
    model = DiCo(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(config):
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 4, 8, 36, generator=generator), torch.tensor([3, 800])
    if config.condition == "class":
        return x, t, torch.tensor([0, 4])
    return x, t, torch.randn(2, 77, 12, generator=generator)


@EVERY
def test_a_fresh_network_says_zero_and_every_weight_is_trained(switches):
    config = DiCoConfig(**SMALL, **switches)
    assert ablated(config) == switches
    x, t, cond = inputs(config)
    fresh = DiCo(config)
    assert not fresh(x, t, cond).any()
    model = randomized(config)
    out = model(x, t, cond)
    assert out.shape == (2, 8, 8, 36)
    out.square().mean().backward()
    untouched = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []
    half = model.bfloat16()(x, t, cond)
    assert half.dtype == torch.bfloat16
    assert (half - out).abs().max() < 0.1 * out.abs().max()


@EVERY
def test_a_sample_does_not_depend_on_its_batch(switches):
    config = DiCoConfig(**SMALL, **switches)
    model, (x, t, cond) = randomized(config).double(), inputs(config)
    torch.testing.assert_close(model(x, t, cond)[1:], model(x[1:], t[1:], cond[1:]), rtol=1e-9, atol=1e-11)


@EVERY
def test_text_kernels_and_recomputation_go_with_it(switches):
    config = DiCoConfig(**TEXT, **switches, text_projection="stage", checkpoint_stages=STAGES)
    model, (x, t, tokens) = randomized(config).train(), inputs(config)
    plain = DiCo(DiCoConfig(**TEXT, **switches, text_projection="stage")).train()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x, t, model.text_kernels(tokens)), model(x, t, tokens))
    assert not torch.allclose(model(x, t, tokens), model(x, t, tokens.flip(1)))
    for each in (model, plain):
        each(x, t, tokens).square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


@EVERY
@pytest.mark.parametrize("autocast", [False, True])
def test_the_plan_counts_what_the_network_counts(switches, autocast):
    config = DiCoConfig(**SMALL, **switches)
    with torch.device("meta"):
        network = DiCo(config).train()

    def loss():
        with torch.device("meta"):
            return network(torch.empty(2, 4, 16, 16), torch.empty(2), torch.zeros(2, dtype=torch.int64)).mean()

    done = trace_training(network, loss, autocast=autocast)
    work = (done.products + done.others)[: done.forward].sum()
    assert work == 2 * 2 * count_macs(config, (1, 4, 16, 16))


def test_patches_go_in_and_out_at_their_places():
    """Without blocks, and with a stem and a head that pass on what they get, the network is a norm of each patch."""
    config = DiCoConfig(**{**SMALL, "hidden_size": 16, "depths": (0,) * 5}, layout="isotropic", learn_sigma=False)
    model = DiCo(config).double()
    with torch.no_grad():
        for conv in (model.stem, model.head.out):
            conv.weight.zero_()
            conv.weight[:, :, 1, 1] = torch.eye(16)
    x, t, labels = inputs(config)
    x = x.double()
    patches = x.reshape(2, 4, 4, 2, 18, 2)
    mean = patches.mean((1, 3, 5), keepdim=True)
    deviation = patches.var((1, 3, 5), keepdim=True, correction=0).add(1e-6).sqrt()
    torch.testing.assert_close(model(x, t, labels), ((patches - mean) / deviation).reshape(x.shape))


def test_released_weights_and_parts_of_another_mixer_are_refused():
    model = DiCo(DiCoConfig(**SMALL, activation="relu", depthwise_kernel=5))
    with pytest.raises(ValueError, match="build the model without depthwise_kernel: 5, activation: relu"):
        load_official_state_dict(model, {})
    with pytest.raises(ValueError, match="it belongs to mixer: conv; leave it out with mixer: agent"):
        DiCoConfig(**SMALL, mixer="agent", channel_attention="se")


def test_every_row_of_the_paper_has_a_config():
    assert len(ROWS) == 12


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_rows_have_the_size_that_their_headers_and_the_docs_say(path):
    model = load_config(path).model
    parameters = count_parameters(model)
    assert ablated(model)
    if {"layout", "mixer"} & ablated(model).keys():
        assert abs(parameters / DICO_S - 1) < 0.01
    said = re.search(r"\(([\d.]+)M parameters\)", path.read_text())
    assert said
    assert float(said[1]) == round(parameters / 1e6, 1)
    (row,) = [line for line in (ROOT / "docs" / "networks.md").read_text().splitlines() if f"`{path.name}`" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert float(cells[2]) == round(parameters / 1e6, 2)
    assert float(cells[3]) == round(count_macs(model, (1, 4, 32, 32)) / 1e9, 2)
