"""DiG, DiS and DiM beside their golden numbers: sizes, initial weights, and what the golden numbers do not hold."""

import math

import pytest
import torch
import torch.nn.functional as F

from dico_t2i.config.networks import DIG_VARIANTS, DIM_VARIANTS, DIS_VARIANTS, DiGConfig, DiMConfig, DiSConfig
from dico_t2i.models import build_network, count_macs, count_parameters, count_scan_macs
from dico_t2i.models.peers.dim import ORDERS, Turn, order_of
from tests.models.test_peers import PEERS, inputs, randomized

# Parameters that are trained, and GMACs of products and convolutions, at 256 pixels.
PUBLISHED = [
    (DiGConfig(variant="DiG-S/2"), 32_983_328, 5.491),
    (DiGConfig(variant="DiG-S/2", skips="xavier"), 34_459_808, 5.868),
    (DiGConfig(variant="DiG-B/2"), 130_551_584, 21.875),
    (DiGConfig(variant="DiG-XL/2"), 675_659_040, 114.666),
    (DiSConfig(variant="DiS-S/2"), 29_132_752, 6.864),
    (DiSConfig(variant="DiS-S/4"), 29_115_184, 1.761),
    (DiMConfig(variant="DiM-S/2", in_channels=3, num_classes=10), 50_568_716, 17.629),
]


@pytest.mark.parametrize(("config", "parameters", "gmacs"), PUBLISHED, ids=lambda value: getattr(value, "kind", value))
def test_sizes_and_work_are_those_of_the_code(config, parameters, gmacs):
    assert count_parameters(config) == parameters
    shape = (1, config.in_channels, 32, 32)
    scans = count_scan_macs(config, shape)
    assert abs((count_macs(config, shape) - scans) / 1e9 / gmacs - 1) < 1e-3
    assert scans == own_work(config)


def own_work(config):
    """Three multiply-accumulates for each number of a state and token."""
    width, tokens = config.hidden_size, (32 // config.patch_size) ** 2
    if config.kind == "dig":
        head = width // config.num_heads
        return 3 * config.depth * tokens * config.num_heads * head * (head // 2)
    if config.kind == "dis":
        return 3 * 2 * (config.depth + 1) * (tokens + 2) * 2 * width * 16
    return 3 * config.depth * ((32 // config.patch_size + 3) ** 2 + 5) * 2 * width * 16


@pytest.mark.parametrize("variants", [DIG_VARIANTS, DIS_VARIANTS, DIM_VARIANTS])
def test_every_size_is_a_network(variants):
    section = {"DiG": DiGConfig, "DiS": DiSConfig, "DiM": DiMConfig}[next(iter(variants))[:3]]
    assert all(section(variant=name).depth >= 12 for name in variants)


def made(config):
    torch.manual_seed(0)
    return {name: weight.detach() for name, weight in build_network(config).named_parameters()}


def test_a_dig_starts_as_its_code_does():
    w = made(DiGConfig(hidden_size=64, depth=4, num_heads=2, num_classes=7, skips="identity"))
    assert not any(w[name].any() for name in w if "adaLN" in name or "final_layer" in name or name.endswith("bias"))
    assert torch.equal(w["blocks.3.skip_linear.weight"], torch.eye(64, 128))
    identity = torch.zeros(64, 1, 3, 3)
    identity[:, 0, 1, 1] = 1
    assert torch.equal(w["blocks.0.dw_conv.weight"], identity)
    xavier = math.sqrt(6 / (64 + 512))
    assert xavier * 0.98 < w["blocks.0.mlp.gate_proj.weight"].abs().max() <= xavier
    small = math.sqrt(6 / 128) * 2**-2.5
    assert small * 0.98 < w["blocks.0.attn.v_proj.weight"].abs().max() <= small
    assert math.isclose(w["t_embedder.mlp.0.weight"].std(), 0.02, rel_tol=0.05)
    assert math.isclose(w["y_embedder.embedding_table.weight"].std(), 0.02, rel_tol=0.1)
    skip = made(DiGConfig(hidden_size=64, depth=4, num_heads=2, num_classes=7, skips="xavier"))
    bound = math.sqrt(6 / (64 + 128))
    assert bound * 0.98 < skip["blocks.3.skip_linear.weight"].abs().max() <= bound


@pytest.mark.parametrize("kind", ["dis", "dim"])
def test_mamba_blocks_start_as_their_code_does(kind):
    section = {"dis": DiSConfig, "dim": DiMConfig}[kind]
    w = made(section(hidden_size=64, depth=5, num_classes=7, latent_size=8))
    block = {"dis": "out_blocks.1.mixer", "dim": "transformer_blocks.4.attn1"}[kind]
    assert torch.equal(w[f"{block}.A_log"], torch.arange(1.0, 17).log().expand(128, 16))
    assert torch.equal(w[f"{block}.D"], torch.ones(128))
    steps = F.softplus(w[f"{block}.dt_proj.bias"])
    assert 1e-3 * 0.99 < steps.min() < 2e-3
    assert 0.05 < steps.max() < 0.1 * 1.01
    assert math.isclose(w[f"{block}.dt_proj.weight"].abs().max(), 4**-0.5, rel_tol=0.05)
    assert math.isclose(w[f"{block}.out_proj.weight"].abs().max(), 128**-0.5 / 5**0.5, rel_tol=0.05)
    assert w[f"{block}.conv1d.bias"].any()
    zero = {"dis": ("pos_embed", "time_embed.0.bias", "out_blocks.0.skip_linear.bias", "final_layer.linear.bias")}
    zero["dim"] = ("additional_embed", "adaln_single.linear.bias", "transformer_blocks.4.skip_linear.bias")
    assert not any(w[name].any() for name in zero[kind])
    if kind == "dis":
        assert not w[f"{block}.dt_proj_b.bias"].any()
        assert math.isclose(w["label_emb.embedding_table.weight"].std(), 0.02, rel_tol=0.15)
        assert w["final_layer.linear.weight"].any()
        assert w["final_layer.adaLN_modulation.1.weight"].any()
        return
    for name in ("label_emb.weight", "a4m_adapter.pad_token", "a4m_adapter.pad_token_dec_split"):
        assert math.isclose(w[name].std(), 0.02, rel_tol=0.15), name
    time = "adaln_single.emb.timestep_embedder.linear_1"
    assert math.isclose(w[f"{time}.weight"].std(), 0.02, rel_tol=0.05)
    assert math.isclose(w["transformer_blocks.0.scale_shift_table"].std(), 64**-0.5, rel_tol=0.15)
    assert w["a4m_adapter.first_smoother.bias"].any()
    assert 0.3 < w["a4m_adapter.first_smoother.weight"].abs().max() <= 1 / 3


def test_dim_scans_in_four_directions_and_mirrors_them():
    assert [ORDERS.index(order_of(number, 9)) for number in range(9)] == [0, 1, 2, 3, 0, 3, 2, 1, 0]
    numbers = torch.arange(8.0).reshape(1, 8, 1)
    turned = Turn(front=2, height=2, width=3, transposed=True, reversed_=True)(numbers)
    assert turned.flatten().tolist() == [0, 1, 7, 4, 6, 3, 5, 2]


def test_stochastic_depth_is_a_function_of_the_sample():
    """Whatever the batch and the process's random numbers; the rates rise to the last one."""
    network = build_network(DiSConfig(hidden_size=8, depth=10, num_classes=7, latent_size=4, drop_path=0.5)).train()
    x = torch.randn(4000, 4, 4, 4)
    kept = torch.stack(network._stochastic_depth(x))[..., 0, 0]
    assert torch.equal(kept[:, 5:9], torch.stack(network._stochastic_depth(x[5:9]))[..., 0, 0])
    rates = [0.0, *torch.linspace(0, 0.5, 10).tolist(), 0.5]
    torch.testing.assert_close(kept.eq(0).double().mean(1).tolist(), rates, rtol=0, atol=0.03)
    torch.testing.assert_close(kept.mean(1), torch.ones(12, dtype=kept.dtype), rtol=0, atol=0.06)
    assert network.eval()._stochastic_depth(x) == [None] * 12


def test_stochastic_depth_leaves_blocks_out_in_training_alone():
    network = randomized(DiSConfig(hidden_size=8, depth=4, num_classes=7, latent_size=8, drop_path=0.9))
    x, t, cond, _ = inputs(PEERS["dis"])
    assert not torch.allclose(network.train()(x, t, cond), network.eval()(x, t, cond))


@pytest.mark.parametrize("kind", ["dig", "dis", "dim"])
def test_without_a_condition_labels_have_no_effect(kind):
    config = type(PEERS[kind]).model_validate({**PEERS[kind].model_dump(), "num_classes": 0})
    network = randomized(config).eval()
    x, t, cond, _ = inputs(PEERS[kind])
    assert torch.equal(network(x, t, cond), network(x, t, torch.zeros_like(cond)))
    assert not torch.allclose(network(x, t, cond), network(x, t.flip(0), cond), atol=1e-4)


@pytest.mark.parametrize("kind", ["dig", "dis", "dim"])
def test_bf16_is_close_to_fp32(kind):
    network = randomized(PEERS[kind], 0.02).eval()
    x, t, cond, _ = inputs(PEERS[kind])
    expected = network(x, t, cond)
    assert (network.bfloat16()(x, t, cond) - expected).abs().max() < 0.06 * expected.abs().max()


def test_positions_of_other_sizes():
    """DiG's are computed; DiM's are interpolated, so that those of a constant stay what they are."""
    x, t, cond, _ = inputs(PEERS["dig"], 16, 16)
    small, large = randomized(PEERS["dig"]), build_network(PEERS["dig"].model_copy(update={"latent_size": 16}))
    state = small.state_dict()
    large.load_state_dict({name: value for name, value in state.items() if name != "pos_embed"})
    torch.testing.assert_close(small(x, t, cond), large(x, t, cond))
    dim = build_network(PEERS["dim"])
    torch.nn.init.constant_(dim.additional_embed, 0.5)
    assert torch.equal(dim._positions(8, 5), torch.full((1, 2 + 40, 16), 0.5))


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (DiGConfig, {"hidden_size": 24, "depth": 4, "num_heads": 8}, "half of 24 must be divisible"),
        (DiGConfig, {"hidden_size": 24, "depth": 5, "num_heads": 2, "skips": "xavier"}, "depth: 5 must be even"),
        (DiMConfig, {"hidden_size": 24, "depth": 4}, "depth: 4 must be odd"),
        (DiMConfig, {"hidden_size": 24, "depth": 5, "learn_sigma": True}, "learn_sigma"),
    ],
)
def test_impossible_sizes_are_named(section, fields, message):
    with pytest.raises(ValueError, match=message):
        section(**fields)
