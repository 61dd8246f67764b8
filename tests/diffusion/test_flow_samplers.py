"""Samplers of the flow on Gaussian data, where the velocity, the map from noise to data and all marginals are known.

For x_0 ~ N(MU, s^2): x_t ~ N((1 - t) MU, (1 - t)^2 s^2 + t^2), and the flow takes z at time 1 to MU + s z.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from dico_t2i import randomness
from dico_t2i.config import DiffusionConfig, SamplerConfig
from dico_t2i.diffusion import ModelFn, guided, sample
from dico_t2i.diffusion.flow_samplers import flow_times

MU = 0.5
FLOW = DiffusionConfig(kind="flow")
KINDS = ["euler", "heun", "dpm++", "euler_sde"]


def variance_at(t: Any, s: float) -> Any:
    return (1 - t) ** 2 * s**2 + t**2


def best_velocity(s: float) -> ModelFn:
    """E[noise - x_0 | x_t]."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        t = (t / 1000).view(-1, 1, 1, 1)
        return (t - (1 - t) * s**2) / variance_at(t, s) * (x - (1 - t) * MU) - MU

    return model


def no_noise(k: int) -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def error(kind: Any, steps: int, s: float, shift: float = 1.0) -> float:
    """RMS distance from the exact map over z in -2..2; steps of the solver, which heun takes 2n - 1 evaluations for."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    sampler = SamplerConfig(kind=kind, steps=2 * steps - 1 if kind == "heun" else steps, shift=shift)
    got = sample(FLOW, sampler, best_velocity(s), z, no_noise, False)
    return (got - (MU + s * z)).square().mean().sqrt().item()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("s", [0.3, 0.6])
@pytest.mark.parametrize(("kind", "order", "slack"), [("euler", 1, 0.03), ("heun", 2, 0.03), ("dpm++", 2, 0.35)])
def test_order_of_convergence(kind: Any, order: int, slack: float, s: float, shift: float) -> None:
    """dpm++ is of order 2 but for a logarithm: its last few steps are long in log(alpha/sigma), however many."""
    errors = [error(kind, steps, s, shift) for steps in (512, 1024)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=slack)
    assert errors[1] < {"euler": 2e-3, "heun": 2e-5, "dpm++": 2e-4}[kind]


@pytest.mark.parametrize("s", [0.3, 0.6, 1.0])
def test_the_second_order_pays_at_equal_cost(s: float) -> None:
    """At 19 and 49 evaluations of the network each."""
    for evaluations in (19, 49):
        euler = error("euler", evaluations, s)
        assert error("heun", (evaluations + 1) // 2, s) < 0.75 * euler
        assert error("dpm++", evaluations, s) < 0.3 * euler


def moments(sampler: SamplerConfig, s: float) -> tuple[float, float]:
    """Mean and variance of the samples from x_1 ~ N(0, 1): the sampler is affine in its noises, so from impulses."""
    x = torch.zeros(sampler.steps + 2, 1, 1, 1, dtype=torch.float64)
    x[1] = 1

    def impulse(k: int) -> Tensor:
        noise = torch.zeros_like(x)
        noise[k + 2] = 1
        return noise

    out = sample(FLOW, sampler, best_velocity(s), x, impulse, False).flatten()
    return out[0].item(), (out[1:] - out[0]).square().sum().item()


def test_the_stochastic_sampler_has_the_flows_marginals() -> None:
    """Of infinitely many steps down to time 0.04, followed by its last step, at first order."""
    s, t = 0.6, 0.04
    slope = (t - (1 - t) * s**2) / variance_at(t, s)  # of v in x_t
    gain = 1 - t * (slope + 1 + (1 - t) * slope)  # of the last step, x - t (v + E[noise | x])
    expected = gain**2 * variance_at(t, s)
    means, variances = zip(
        *(moments(SamplerConfig(kind="euler_sde", steps=n), s) for n in (100, 200, 400)), strict=True
    )
    off = np.abs(np.array(variances) - expected)
    assert means == pytest.approx([MU] * 3, abs=1e-12)
    assert np.log2(off[:-1] / off[1:]) == pytest.approx([1, 1], abs=0.1)
    assert off[-1] < 4e-3
    assert expected == pytest.approx(s**2, rel=0.02)


def test_one_euler_step_is_the_mean_of_the_data() -> None:
    z = torch.tensor([-1.0, 3.0], dtype=torch.float64).view(-1, 1, 1, 1)
    got = sample(FLOW, SamplerConfig(kind="euler", steps=1), best_velocity(0.6), z, no_noise, False)
    assert got.flatten().tolist() == pytest.approx([MU, MU])


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_dpm_solver_is_that_of_diffusers(shift: float) -> None:
    """Given the same times; its own are rounded, and do not begin at 1."""
    sampler = SamplerConfig(kind="dpm++", steps=8, shift=shift)
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero", lower_order_final=False
    )
    scheduler.set_timesteps(8)
    scheduler.sigmas = torch.tensor(flow_times(sampler), dtype=torch.float64)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return (x + t.view(-1, 1, 1, 1) / 300).sin()

    x = z
    for time, t in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        x = scheduler.step(network(x, (1000 * time).expand(len(x))), t, x).prev_sample
    got = sample(FLOW, sampler, network, z, no_noise, False)
    torch.testing.assert_close(got, x.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "steps", "asked"),
    [
        ("euler", 4, [1000, 750, 500, 250]),
        ("dpm++", 4, [1000, 750, 500, 250]),
        ("heun", 7, [1000, 750, 750, 500, 500, 250, 250]),
        ("euler_sde", 4, [1000, 680, 360, 40]),
    ],
)
def test_evaluations_progress_and_precision(kind: Any, steps: int, asked: list[float]) -> None:
    weight = torch.tensor(0.5, requires_grad=True)
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return (x * weight).bfloat16()

    done: list[tuple[int, int]] = []
    noise = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    sampler = SamplerConfig(kind=kind, steps=steps)
    out = sample(FLOW, sampler, model, noise, lambda k: noise, False, lambda k, steps: done.append((k, steps)))
    assert [t[0].item() for t in seen] == pytest.approx(asked)
    assert all(t.dtype == torch.float32 and t[0] == t[1] for t in seen)
    assert done == [(k + 1, steps) for k in range(steps)]
    assert out.dtype == torch.float32
    assert not out.requires_grad


def test_shift_spends_steps_near_noise() -> None:
    times = flow_times(SamplerConfig(kind="euler", steps=4, shift=3.0))
    assert times == pytest.approx([1, 0.9, 0.75, 0.5, 0])


def noises(index: Tensor, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    return lambda k: randomness.normal(0, f"step noise {k}", index, shape)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_depends_on_its_own_seed_only(kind: Any) -> None:
    shape = (3, 2, 2)

    def run(index: Tensor) -> Tensor:
        noise = randomness.normal(0, "initial noise", index, shape)
        return sample(FLOW, SamplerConfig(kind=kind, steps=7), best_velocity(0.4), noise, noises(index, shape), False)

    together = run(torch.arange(5))
    assert torch.equal(together, run(torch.arange(5)))
    alone = torch.cat([run(torch.tensor([i])) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert together.flatten(1).std(0).min() > 0


class Network:
    """A velocity that depends on the condition; counts the samples that go through it."""

    def __init__(self) -> None:
        self.samples = 0

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        self.samples += len(x)
        return (x + t.view(-1, 1, 1, 1) / 300).sin() + cond.view(-1, 1, 1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_in_an_interval_costs_what_it_guides(kind: Any) -> None:
    """Everywhere it is plain guidance and nowhere the conditional network, bit for bit."""
    shape, index = (3, 2, 2), torch.arange(2)
    noise = randomness.normal(0, "initial noise", index, shape)
    cond, null = {"cond": torch.tensor([0.5, -0.2])}, {"cond": torch.zeros(2)}

    def run(scale: float, *interval: tuple[float, float]) -> tuple[Tensor, int]:
        network = Network()
        model = guided(network, cond, null, scale, "all", *interval)
        out = sample(FLOW, SamplerConfig(kind=kind, steps=21), model, noise, noises(index, shape), False)
        return out, network.samples

    plain, conditional = run(3.0), run(1.0)
    assert (plain[1], conditional[1]) == (84, 42)
    for found, expected in ((run(3.0, (0.0, 1.0)), plain), (run(3.0, (0.001, 0.002)), conditional)):
        assert torch.equal(found[0], expected[0])
        assert found[1] == expected[1]
    some, samples = run(3.0, (0.3, 0.8))
    assert 42 < samples < 84
    assert not torch.equal(some, plain[0])


@pytest.mark.parametrize(
    ("diffusion", "sampler", "message"),
    [
        (FLOW, {"kind": "ddim"}, "sampler.kind: ddim cannot sample diffusion.kind: flow; use euler, heun"),
        (DiffusionConfig(), {"kind": "euler"}, "sampler.kind: euler cannot sample diffusion.kind: iddpm"),
        (DiffusionConfig(), {"kind": "dpm++", "shift": 2.0}, "sampler.shift: it is for diffusion.kind: flow"),
        (FLOW, {"kind": "heun", "steps": 50}, "steps: heun takes an odd number of evaluations, such as 49 or 51"),
    ],
)
def test_impossible_samplers_are_refused(diffusion: DiffusionConfig, sampler: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(diffusion, SamplerConfig(**sampler), lambda x, t: x, torch.zeros(1, 3, 2, 2), no_noise, False)
