"""Schedules: published formulas, and respacing that keeps the process at the kept steps."""

import json
from pathlib import Path

import numpy as np
import pytest

from dico_t2i.diffusion.schedule import make_schedule, noise_betas, space_timesteps

TIMESTEP_MAPS = Path(__file__).resolve().parents[3] / "shared" / "golden" / "timestep_maps.json"


def test_linear_betas_are_the_published_ones() -> None:
    betas = noise_betas(1000, "linear")
    np.testing.assert_allclose(betas[[0, 1, -1]], [1e-4, 1e-4 + (0.02 - 1e-4) / 999, 0.02], rtol=1e-12)


def test_linear_schedules_of_any_length_end_at_the_same_noise() -> None:
    ends = [np.cumprod(1 - noise_betas(steps, "linear"))[-1] for steps in (500, 1000, 4000)]
    assert max(ends) / min(ends) < 1.2
    assert ends[1] == pytest.approx(4.036e-5, rel=1e-3)


def test_cosine_alphas_cumprod_follow_the_formula_where_beta_is_not_capped() -> None:
    t = np.arange(1, 990) / 1000
    expected = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(make_schedule(1000, "squaredcos_cap_v2").alphas_cumprod[:989], expected, rtol=1e-9)
    assert noise_betas(1000, "squaredcos_cap_v2").max() == 0.999


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("respacing", ["250", "20", "ddim50", "10,15,20"])
def test_respacing_keeps_the_noise_levels(name: str, respacing: str) -> None:
    full, kept = make_schedule(1000, name), make_schedule(1000, name, respacing)
    np.testing.assert_allclose(kept.alphas_cumprod, full.alphas_cumprod[kept.timestep_map], rtol=1e-9)
    np.testing.assert_allclose(np.cumprod(1 - kept.betas), kept.alphas_cumprod, rtol=1e-12)


def test_posterior_agrees_with_bayes() -> None:
    """Precision of q(x_{t-1} | x_t, x_0) = that of q(x_{t-1} | x_0) + that of q(x_t | x_{t-1}) in x_{t-1}."""
    s = make_schedule(1000, "linear", "50")
    abar, before, beta = s.alphas_cumprod[1:], s.alphas_cumprod[:-1], s.betas[1:]
    precision = 1 / (1 - before) + (1 - beta) / beta
    np.testing.assert_allclose(s.posterior_variance[1:], 1 / precision, rtol=1e-10)
    np.testing.assert_allclose(s.posterior_mean_coef1[1:], np.sqrt(before) / (1 - before) / precision, rtol=1e-10)
    np.testing.assert_allclose(s.posterior_mean_coef2[1:], np.sqrt(1 - beta) / beta / precision, rtol=1e-10)
    np.testing.assert_allclose(abar, before * (1 - beta), rtol=1e-12)
    assert s.posterior_variance[0] == 0
    assert s.posterior_log_variance_clipped[0] == np.log(s.posterior_variance[1])


def test_space_timesteps() -> None:
    assert space_timesteps(5, "") == [0, 1, 2, 3, 4]
    assert space_timesteps(1000, "5") == [0, 250, 500, 749, 999]  # 499.5 -> 500, 749.25 -> 749
    assert space_timesteps(1000, "ddim4") == [0, 250, 500, 750]
    assert space_timesteps(7, "2,1") == [0, 3, 4]  # the first section is one longer


def test_space_timesteps_equal_the_golden_maps() -> None:
    if not TIMESTEP_MAPS.exists():
        pytest.skip(f"no golden numbers at {TIMESTEP_MAPS}")
    for request, expected in json.loads(TIMESTEP_MAPS.read_text()).items():
        steps, spec = request.split("|")
        if expected == "ValueError":
            with pytest.raises(ValueError, match="timesteps"):
                space_timesteps(int(steps), spec)
        else:
            assert space_timesteps(int(steps), spec) == expected, request


@pytest.mark.parametrize(
    ("steps", "name", "respacing", "message"),
    [
        (1000, "linear", "1001", "cannot keep 1001"),
        (1000, "linear", "-3", "cannot keep -3"),
        (1000, "linear", "ddim999", "no fixed stride takes exactly 999"),
        (1000, "linear", "1", "at least 2"),
        (20, "linear", "", "more than 20 steps"),
        (1000, "sigmoid", "", "'sigmoid' is not one of"),
    ],
)
def test_impossible_schedules_are_refused(steps: int, name: str, respacing: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(steps, name, respacing)
