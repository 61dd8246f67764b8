"""Guidance: the formula, where it applies, and how often the network runs."""

import pytest
import torch
from torch import Tensor

from dico_t2i.diffusion import guided


class Network:
    """Output (N, 2C, H, W) that depends on every input; counts its calls."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.batches: list[int] = []
        self.dtype = dtype

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor, pooled: Tensor) -> Tensor:
        self.batches.append(len(x))
        shift = (cond.mean((1, 2)) + 2 * pooled.mean(1) + t / 100).view(-1, 1, 1, 1)
        return torch.cat((x * shift, (x + shift).sin()), 1).to(self.dtype)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    cond, null = ({"cond": draw(3, 7, 5), "pooled": draw(3, 6)} for _ in range(2))
    return draw(3, 4, 2, 2), torch.tensor([1, 500, 999]), cond, null


def test_guidance_is_uncond_plus_w_times_the_difference(inputs) -> None:
    x, t, cond, null = inputs
    network = Network()
    c, u = network(x, t, **cond), network(x, t, **null)
    got = guided(network, cond, null, 3.5)(x, t)
    torch.testing.assert_close(got[:, :4], u[:, :4] + 3.5 * (c - u)[:, :4])
    assert torch.equal(got[:, 4:], c[:, 4:])  # the learned variance is the conditional one
    assert network.batches == [3, 3, 6]  # one pass over both halves


def test_w_1_is_the_conditional_network_in_one_pass_of_n(inputs) -> None:
    x, t, cond, null = inputs
    network = Network()
    expected = network(x, t, **cond)
    assert torch.equal(guided(network, cond, null, 1.0)(x, t), expected)
    assert network.batches == [3, 3]
    torch.testing.assert_close(guided(network, cond, null, 1 + 1e-12)(x, t), expected)


def test_w_0_is_the_unconditional_prediction(inputs) -> None:
    x, t, cond, null = inputs
    network = Network()
    got = guided(network, cond, null, 0.0)(x, t)
    assert torch.equal(got[:, :4], network(x, t, **null)[:, :4])


def test_three_leaves_the_fourth_channel_conditional(inputs) -> None:
    x, t, cond, null = inputs
    network = Network()
    c, u = network(x, t, **cond), network(x, t, **null)
    got = guided(network, cond, null, 1.4, "three")(x, t)
    torch.testing.assert_close(got[:, :3], u[:, :3] + 1.4 * (c - u)[:, :3])
    assert torch.equal(got[:, 3:], c[:, 3:])


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_half_precision_network_is_guided_in_float32(inputs, scale: float) -> None:
    x, t, cond, null = inputs
    network = Network(torch.bfloat16)
    c, u = (network(x, t, **k).float()[:, :4] for k in (cond, null))
    got = guided(network, cond, null, scale)(x, t)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[:, :4], u + scale * (c - u), rtol=1e-6, atol=1e-6)


def test_conditionings_that_do_not_match_are_refused(inputs) -> None:
    _, _, cond, null = inputs
    with pytest.raises(ValueError, match="null conditioning of the same shapes"):
        guided(Network(), cond, {"cond": null["cond"]}, 2.0)
    with pytest.raises(ValueError, match="null conditioning of the same shapes"):
        guided(Network(), cond, {**null, "pooled": null["pooled"][:2]}, 2.0)


@pytest.mark.parametrize(("t", "guides"), [(299.0, False), (300.0, True), (555.5, True), (800, True), (801, False)])
def test_outside_of_the_interval_the_conditional_network_runs_alone(inputs, t: float, guides: bool) -> None:
    x, _, cond, null = inputs
    times, network = torch.full((3,), t), Network()
    got = guided(network, cond, null, 3.5, interval=(0.3, 0.8))(x, times)
    assert network.batches == [6 if guides else 3]
    assert torch.equal(got, guided(network, cond, null, 3.5 if guides else 1.0)(x, times))


def test_one_null_serves_all_samples(inputs) -> None:
    x, t, cond, _ = inputs
    network = Network()
    one = {name: value[:1] for name, value in cond.items()}
    each = {name: value.expand_as(cond[name]) for name, value in one.items()}
    assert torch.equal(guided(network, cond, one, 2.0)(x, t), guided(network, cond, each, 2.0)(x, t))
