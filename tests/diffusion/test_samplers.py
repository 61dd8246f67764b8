"""Samplers on Gaussian data, where the best network and the exact samples are known in closed form.

For x_0 ~ N(mu, s^2) the network is affine in x, so a sampler is affine in its noises, and the mean and variance of
what it samples follow exactly from a batch of unit impulses: no Monte Carlo, no statistical tolerance.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dico_t2i import randomness
from dico_t2i.config import DiffusionConfig, SamplerConfig
from dico_t2i.diffusion import ModelFn, sample
from dico_t2i.diffusion.iddpm import build
from dico_t2i.diffusion.samplers import log_snr_timesteps

MU = 0.5


def column(x: Any) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64).view(-1, 1, 1, 1)


def gaussian_network(config: DiffusionConfig, s: float, kept: str | None = None) -> ModelFn:
    """The best prediction for N(MU, s^2); with ``kept``, also the variance of the exact reverse process."""
    abar = torch.from_numpy(build(config, False).schedule.alphas_cumprod)

    def x_start_of(x: Tensor, a: Tensor) -> Tensor:
        return MU + a.sqrt() * s**2 / (a * s**2 + 1 - a) * (x - a.sqrt() * MU)

    def model(x: Tensor, t: Tensor) -> Tensor:
        a = column(abar[t])
        x_start = x_start_of(x, a)
        prediction = x_start if config.prediction == "x0" else (x - a.sqrt() * x_start) / (1 - a).sqrt()
        if kept is None:
            return prediction
        schedule = build(config, True, kept).schedule
        i = np.searchsorted(schedule.timestep_map, t.numpy())
        # Var(x_{t-1} | x_t) = posterior variance + coef1^2 Var(x_0 | x_t); then as a fraction of log-variances.
        unknown = s**2 * (1 - a) / (a * s**2 + 1 - a)
        variance = column(schedule.posterior_variance[i]) + column(schedule.posterior_mean_coef1[i]) ** 2 * unknown
        low, high = column(schedule.posterior_log_variance_clipped[i]), column(schedule.log_betas[i])
        fraction = torch.where(high > low, (variance.log() - low) / (high - low), 0)
        return torch.cat((prediction, (2 * fraction - 1).expand_as(x)), 1)

    return model


def moments(
    config: DiffusionConfig, sampler: SamplerConfig, model: ModelFn, learn_sigma: bool, start: tuple[float, float]
) -> tuple[float, float]:
    """Mean and variance of the samples when x_T ~ N(start[0], start[1]^2)."""
    x = torch.full((sampler.steps + 2, 1, 1, 1), start[0], dtype=torch.float64)
    x[1] += start[1]

    def impulse(k: int) -> Tensor:
        noise = torch.zeros_like(x)
        noise[k + 2] = 1
        return noise

    out = sample(config, sampler, model, x, impulse, learn_sigma).flatten()
    response = out[1:] - out[0]
    return out[0].item(), (response**2).sum().item()


def exact(config: DiffusionConfig, s: float, z: Tensor) -> Tensor:
    """Where the probability flow takes x_T = z."""
    a = column(build(config, False).schedule.alphas_cumprod[-1])
    return MU + s * (z - a.sqrt() * MU) / (a * s**2 + 1 - a).sqrt()


def error(config: DiffusionConfig, kind: Any, steps: int, s: float) -> float:
    """RMS distance from the exact solution over x_T in -2..2."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    sampler = SamplerConfig(kind=kind, steps=steps)
    got = sample(config, sampler, gaussian_network(config, s), z, no_noise, False)
    return (got - exact(config, s, z)).square().mean().sqrt().item()


def no_noise(k: int) -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


@pytest.mark.parametrize("steps", [5, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "x0"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ancestral_sampling_with_the_best_network_is_exact(schedule: Any, prediction: Any, steps: int) -> None:
    """At any number of steps: the reverse of Gaussian data is Gaussian. The last step returns a mean."""
    config, s = DiffusionConfig(schedule=schedule, prediction=prediction), 0.6
    abar = build(config, False).schedule.alphas_cumprod
    start = (abar[-1] ** 0.5 * MU, (abar[-1] * s**2 + 1 - abar[-1]) ** 0.5)
    model = gaussian_network(config, s, kept=str(steps))
    mean, variance = moments(config, SamplerConfig(steps=steps), model, True, start)
    left_out = s**2 * (1 - abar[0]) / (abar[0] * s**2 + 1 - abar[0])
    assert mean == pytest.approx(MU, abs=1e-6)
    assert variance == pytest.approx(s**2 - left_out, rel=1e-6)


@pytest.mark.parametrize(("kind", "eta"), [("iddpm", 0.0), ("ddim", 1.0), ("ddim", 0.5), ("ddim", 0.0), ("dpm++", 0.0)])
def test_mean_and_variance_of_gaussian_data(kind: Any, eta: float) -> None:
    config, s = DiffusionConfig(), 0.6
    sampler = SamplerConfig(kind=kind, steps=250, eta=eta)
    mean, variance = moments(config, sampler, gaussian_network(config, s), False, (0.0, 1.0))
    assert mean == pytest.approx(MU, abs=0.01)
    assert variance == pytest.approx(s**2, rel=0.05)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_converges_at_first_order(schedule: Any) -> None:
    config = DiffusionConfig(schedule=schedule)
    errors = [error(config, "ddim", steps, s=0.6) for steps in (25, 100, 400)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[-1] < 6e-3


@pytest.mark.parametrize("prediction", ["epsilon", "x0"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("s", [0.3, 1.0])
def test_dpm_solver_converges_and_beats_ddim(schedule: Any, prediction: Any, s: float) -> None:
    config = DiffusionConfig(schedule=schedule, prediction=prediction)
    errors = [error(config, "dpm++", steps, s) for steps in (5, 10, 20, 50)]
    assert sorted(errors, reverse=True) == errors
    assert errors[2] < 0.3 * error(config, "ddim", 20, s)
    assert errors[3] < error(config, "ddim", 250, s)


@pytest.mark.parametrize("kind", ["ddim", "dpm++"])
def test_few_step_samplers_approach_a_1000_step_ddim_with_the_same_noise(kind: Any) -> None:
    config, network = DiffusionConfig(), gaussian_network(DiffusionConfig(), 0.3)
    z = randomness.normal(0, "noise", torch.arange(4), (2, 3, 3)).double()

    def run(kind: Any, steps: int) -> Tensor:
        return sample(config, SamplerConfig(kind=kind, steps=steps), network, z, no_noise, False)

    reference = run("ddim", 1000)
    errors = [(run(kind, steps) - reference).abs().max().item() for steps in (5, 20, 80)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [2, 3, 20, 50, 250, 900])
def test_dpm_timesteps_are_distinct_and_even_in_log_snr(schedule: Any, steps: int) -> None:
    full = build(DiffusionConfig(schedule=schedule), False).schedule
    timesteps = np.array(log_snr_timesteps(full, steps))
    assert len(timesteps) == steps
    assert (np.diff(timesteps) < 0).all()
    assert timesteps[-1] == 0
    assert 980 <= timesteps[0] <= 999
    if steps <= 20:
        half_log_snr = 0.5 * np.log(full.alphas_cumprod / (1 - full.alphas_cumprod))[timesteps]
        gaps = np.diff(half_log_snr)
        assert gaps.max() < 1.6 * gaps.min()


def noises(index: Tensor, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    return lambda k: randomness.normal(0, f"step {k}", index, shape)


@pytest.mark.parametrize(("kind", "eta"), [("iddpm", 0.0), ("ddim", 0.7), ("dpm++", 0.0)])
def test_an_image_does_not_depend_on_its_batch(kind: Any, eta: float) -> None:
    config, sampler = DiffusionConfig(), SamplerConfig(kind=kind, steps=6, eta=eta)
    shape = (3, 2, 2)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat((0.8 * x + 0.1 * (t / 100).cos().view(-1, 1, 1, 1), x.tanh()), 1)

    def run(index: Tensor) -> Tensor:
        noise = randomness.normal(0, "noise", index, shape)
        return sample(config, sampler, model, noise, noises(index, shape), True)

    together = run(torch.arange(5))
    alone = torch.cat([run(torch.tensor([i])) for i in range(5)])
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert together.flatten(1).std(0).min() > 0


@pytest.mark.parametrize("kind", ["iddpm", "ddim", "dpm++"])
def test_progress_precision_and_gradients(kind: Any) -> None:
    config, sampler = DiffusionConfig(), SamplerConfig(kind=kind, steps=4)
    weight = torch.tensor(0.5, requires_grad=True)
    seen: list[tuple[Any, ...]] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x.dtype, tuple(t.shape), t.dtype))
        return (torch.cat((x, x), 1) * weight).bfloat16()

    done: list[tuple[int, int]] = []
    noise = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    out = sample(config, sampler, model, noise, lambda k: noise, True, lambda k, steps: done.append((k, steps)))
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert seen == [(torch.float32, (2,), torch.int64)] * 4
    assert out.dtype == torch.float32
    assert not out.requires_grad


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (SamplerConfig(kind="iddpm", steps=1001), r"1001, but iddpm takes 2 to diffusion\.steps: 1000"),
        (SamplerConfig(kind="ddim", steps=1), r"1, but ddim takes 2 to diffusion\.steps: 1000"),
        (SamplerConfig(kind="dpm++", steps=1000), r"dpm\+\+ takes 2 to 996 steps here, not 1000"),
    ],
)
def test_impossible_requests_are_refused(sampler: SamplerConfig, message: str) -> None:
    noise = torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match=message):
        sample(DiffusionConfig(schedule="cosine"), sampler, lambda x, t: x, noise, no_noise, False)
