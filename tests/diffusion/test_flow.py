"""The flow's times, losses and weights against closed forms, and what its config refuses."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dico_t2i import randomness
from dico_t2i.config import ConfigError, DiffusionConfig, load_config
from dico_t2i.diffusion import IDDPM, Flow, build
from dico_t2i.diffusion.flow import logit_normal_density, shifted

MU, S = 0.5, 0.6
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def column(x: Any) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64).view(-1, 1, 1, 1)


def quadrature(t: float) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    """x_0 ~ N(MU, S^2) and noise at the points of a Gauss rule, all at timestep t, with the rule's weights."""
    points, weights = np.polynomial.hermite_e.hermegauss(6)
    x_start, noise = (column(g.ravel()) for g in np.meshgrid(MU + S * points, points))
    both = np.outer(weights, weights).ravel() / weights.sum() ** 2
    return x_start, noise, torch.full((len(both),), t, dtype=torch.float64), both


def best_velocity(x: Tensor, t: Tensor) -> Tensor:
    t = (t / 1000).view(-1, 1, 1, 1)
    return (t - (1 - t) * S**2) / ((1 - t) ** 2 * S**2 + t**2) * (x - (1 - t) * MU) - MU


def mean_loss(flow: Flow, t: float, off: float = 0.0, part: str = "loss") -> float:
    """The expected loss of the best network at timestep t, with an error of ``off``."""
    x_start, noise, times, weights = quadrature(t)
    losses = flow.training_losses(lambda x, t: best_velocity(x, t) + off, x_start, times, noise)
    return float(losses[part].numpy() @ weights)


@pytest.mark.parametrize("t", [0.0, 1.0, 250.5, 500.0, 999.0, 1000.0])
def test_the_least_loss_is_the_variance_of_the_velocity(t: float) -> None:
    """Var(noise - x_0 | x_t) = S^2 / ((1-t)^2 S^2 + t^2), and an error adds its square."""
    time = t / 1000
    least = S**2 / ((1 - time) ** 2 * S**2 + time**2)
    assert mean_loss(Flow(), t) == pytest.approx(least, rel=1e-12)
    assert mean_loss(Flow(), t, off=0.3) == pytest.approx(least + 0.09, rel=1e-12)


def test_the_network_sees_the_path_and_the_timestep() -> None:
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.extend((x, t))
        return torch.zeros_like(x)

    x, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)).unbind()
    losses = build(DiffusionConfig(kind="flow"), False).training_losses(model, x, torch.tensor([0, 125, 1000]), noise)
    assert seen[0].dtype == seen[1].dtype == torch.float32
    assert seen[1].tolist() == [0, 125, 1000]
    torch.testing.assert_close(seen[0], torch.stack((x[0], 0.875 * x[1].float() + 0.125 * noise[1], noise[2])))
    torch.testing.assert_close(losses["mse"], (noise.float() - x.float()).square().mean((1, 2, 3)))
    assert torch.equal(losses["loss"], losses["mse"])


def test_a_network_with_variance_channels_is_refused() -> None:
    x = torch.zeros(2, 4, 2, 2)
    with pytest.raises(ValueError, match="learn_sigma must be false"):
        Flow().training_losses(lambda x, t: torch.cat((x, x), 1), x, torch.tensor([1.0, 2.0]), x)


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (-0.8, 0.5, 1.0), (0.3, 1.4, 3.0)])
def test_logit_normal_times(mean: float, std: float, shift: float) -> None:
    """Against the exact distribution; a shift adds its logarithm to the logit."""
    flow = Flow(timesteps="logit_normal", logit_mean=mean, logit_std=std, shift=shift)
    time = flow.draw_timesteps(3, torch.arange(50_000)) / 1000
    centre = mean + math.log(shift)
    assert stats.kstest(torch.logit(time).numpy(), stats.norm(centre, std).cdf).pvalue > 0.01
    edges = torch.linspace(0, 1, 21, dtype=torch.float64)
    counts, _ = np.histogram(time.numpy(), edges.numpy())
    fine = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    area = torch.trapezoid(logit_normal_density(fine, centre, std).unfold(0, 1001, 1000), fine.unfold(0, 1001, 1000))
    assert area.sum().item() == pytest.approx(1, abs=1e-6)
    expected = len(time) * area.numpy()
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected.max())
    assert logit_normal_density(torch.tensor([0.0, 1.0], dtype=torch.float64), mean, std).isfinite().all()


def test_uniform_times_and_their_shift() -> None:
    position = torch.arange(50_000)
    time = Flow().draw_timesteps(0, position) / 1000
    assert stats.kstest(time.numpy(), stats.uniform.cdf).pvalue > 0.01
    moved = Flow(shift=3.0).draw_timesteps(0, position) / 1000
    torch.testing.assert_close(torch.logit(moved), torch.logit(time) + math.log(3), rtol=1e-9, atol=1e-9)
    assert (shifted(0.0, 3.0), shifted(1.0, 3.0)) == (0, 1)


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
def test_a_time_is_a_function_of_seed_and_position(timesteps: Any) -> None:
    flow, position = Flow(timesteps=timesteps), torch.arange(64)
    t = flow.draw_timesteps(1, position)
    assert torch.equal(t[40:], flow.draw_timesteps(1, position[40:]))
    assert not torch.equal(t, flow.draw_timesteps(2, position))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_weighing_with_the_density_is_sampling_from_it(shift: float) -> None:
    """The integral of the loss over uniform times with weights equals that over logit-normal times without."""
    mean, std, n = -0.4, 0.8, 400
    middles = (np.arange(n) + 0.5) / n
    weighing = Flow(weighting="logit_normal", logit_mean=mean, logit_std=std, shift=shift)
    weighed = np.mean([mean_loss(weighing, 1000 * shifted(u, shift)) for u in middles])
    drawn = 1 / (1 + np.exp(-(mean + std * stats.norm.ppf(middles))))
    assert weighed == pytest.approx(np.mean([mean_loss(Flow(), 1000 * shifted(u, shift)) for u in drawn]), rel=1e-3)
    assert mean_loss(weighing, 300, part="mse") == pytest.approx(mean_loss(Flow(), 300), rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0"])
def test_min_snr_weights(schedule: Any, prediction: Any) -> None:
    """Against SNRs from the betas, and as min(SNR, gamma) times the squared error of x_0."""
    config = DiffusionConfig(schedule=schedule, prediction=prediction, weighting="min_snr", min_snr_gamma=5.0)
    t = torch.tensor([0, 1, 100, 300, 500, 998, 999])
    x, noise, output = torch.randn(3, 7, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weighed = build(config, False).training_losses(lambda x, t: output, x, t, noise)
    plain_config = DiffusionConfig(schedule=schedule, prediction=prediction)
    plain = build(plain_config, False).training_losses(lambda x, t: output, x, t, noise)
    process = build(config, False)
    assert isinstance(process, IDDPM)
    abar = np.cumprod(1 - process.schedule.betas)[t.numpy()]
    snr = abar / (1 - abar)
    weight = np.minimum(snr, 5) / (1 if prediction == "x0" else snr)
    np.testing.assert_allclose(process.min_snr_weights(t).numpy(), weight, rtol=1e-9)
    np.testing.assert_allclose((weighed["loss"] / plain["loss"]).numpy(), weight, rtol=1e-9)
    assert torch.equal(weighed["mse"], plain["mse"])
    x_start = process.p_mean_variance(lambda x, t: output, process.q_sample(x, t, noise), t).x_start
    error = (x_start - x).square().mean((1, 2, 3)).numpy()
    np.testing.assert_allclose(weighed["loss"].numpy(), np.minimum(snr, 5) * error, rtol=1e-6)


def test_min_snr_leaves_the_bound_alone() -> None:
    t = torch.tensor([0, 400, 999])
    x, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat((0.5 * x, 0.1 * x), 1)

    plain, weighed = (IDDPM(min_snr_gamma=gamma).training_losses(model, x, t, noise) for gamma in (None, 5.0))
    assert torch.equal(plain["vb"], weighed["vb"])
    weights = IDDPM(min_snr_gamma=5.0).min_snr_weights(t)
    torch.testing.assert_close(weighed["loss"], weights * plain["mse"] + plain["vb"])


def test_iddpm_draws_the_timesteps_it_always_drew() -> None:
    position = torch.arange(100, 200)
    t = build(DiffusionConfig(), True).draw_timesteps(7, position)
    assert torch.equal(t, randomness.integers(7, "timestep", position, 1000))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.learn_sigma=true"], "model.learn_sigma: it must be false with diffusion.kind: flow"),
        (["sampler.kind=ddim"], "sampler.kind: ddim cannot sample diffusion.kind: flow; use euler, heun, dpm++"),
        (["preview.sampler.kind=iddpm"], "preview.sampler.kind: iddpm cannot sample"),
        (["diffusion.kind=iddpm", "sampler.kind=euler"], "sampler.kind: euler cannot sample diffusion.kind: iddpm"),
        (["diffusion.kind=iddpm", "sampler.shift=2"], "sampler.shift: it is for diffusion.kind: flow"),
        (["diffusion.kind=iddpm", "diffusion.timesteps=logit_normal"], "iddpm draws its steps uniformly"),
        (["diffusion.kind=iddpm", "diffusion.shift=3"], "iddpm draws its steps uniformly"),
        (["diffusion.kind=iddpm", "diffusion.weighting=logit_normal"], "logit_normal does not apply to kind: iddpm"),
        (["diffusion.prediction=x0"], "prediction: x0 needs kind: iddpm"),
        (["diffusion.weighting=min_snr"], "min_snr does not apply to kind: flow"),
        (["diffusion.weighting=logit_normal", "diffusion.timesteps=logit_normal"], "give only one of them"),
        (
            ["sampler.kind=heun", "sampler.steps=50"],
            "sampler.steps: heun takes an odd number of evaluations, such as 49 or",
        ),
        (["sampler.kind=euler_sde", "sampler.steps=1"], "sampler.steps: euler_sde takes at least 2"),
        (["sampler.guidance_interval=[0.8, 0.3]"], "[0.8, 0.3] is not in increasing order"),
        (["sampler.guidance_interval=[0, 2]"], "sampler.guidance_interval.1: "),
    ],
)
def test_wrong_combinations_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(CONFIGS / "quickstart.yaml", ["diffusion.kind=flow", *overrides])
    assert message in str(error.value)
