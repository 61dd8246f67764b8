"""Our network against an independent one in the usual style, with the same weights."""

import pytest
import torch

from dico_t2i.models import DiCo, DiCoConfig
from dico_t2i.ops import text_dwconv
from evals.speed.plain_dico import PlainDiCo, grouped_text_dwconv, load_ours

SIZES = {"hidden_size": 8, "depths": (2, 1, 1, 1, 2), "mlp_ratio": 2.0}
TEXT = {"condition": "text", "text_dim": 12, "pooled_dim": 6}
CONFIGS = {
    "class": DiCoConfig(**SIZES, num_classes=5),
    "no null class, fixed variance": DiCoConfig(**SIZES, num_classes=5, dropout_prob=0.0, learn_sigma=False),
    "text": DiCoConfig(**SIZES, **TEXT),
    "text, pooled": DiCoConfig(**SIZES, **TEXT, pooled_text=True),
}


def both(config):
    """The two networks with the same weights, none of them zero."""
    torch.manual_seed(0)
    ours, plain = DiCo(config), PlainDiCo(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    load_ours(plain, ours.state_dict())
    return ours, plain


def inputs(config):
    cond = torch.tensor([0, 4]) if config.condition == "class" else torch.randn(2, 77, 12)
    return torch.randn(2, 4, 8, 12), torch.tensor([3, 800]), cond, torch.randn(2, 6) if config.pooled_text else None


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_agree(name):
    ours, plain = both(CONFIGS[name])
    arguments = inputs(CONFIGS[name])
    results = []
    for network in (ours, plain):
        x = arguments[0].clone().requires_grad_()
        out = network(x, *arguments[1:])
        out.square().mean().backward()
        weights = network.stem.weight if network is ours else network.x_embedder.proj.weight
        results.append((out, x.grad, weights.grad))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_what_the_plain_network_lacks_is_said():
    with pytest.raises(ValueError, match="by convolution"):
        PlainDiCo(DiCoConfig(**SIZES, **TEXT, text_fusion="cross_attention"))
    with pytest.raises(KeyError):
        load_ours(PlainDiCo(CONFIGS["class"]), DiCo(CONFIGS["text"]).state_dict())


def test_its_text_convolution_is_ours():
    x, context = torch.randn(2, 3, 6, 7), torch.randn(2, 77, 3)
    assert torch.allclose(grouped_text_dwconv(x, context), text_dwconv(x, context), atol=1e-5)
