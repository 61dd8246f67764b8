"""Losses and single steps against torch.distributions, autograd and diffusers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dico_t2i.config import DiffusionConfig
from dico_t2i.diffusion import IDDPM
from dico_t2i.diffusion.iddpm import build, discretized_gaussian_log_likelihood

T = torch.tensor([0, 1, 10, 500, 999])


def tensors(channels: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x_0, noise and a network output for five samples."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(5, c, 4, 3, generator=generator, dtype=dtype) for c in (4, 4, channels)]
    return draw[0].clamp(-1, 1), draw[1], 0.3 * draw[2]


def constant(output: Tensor) -> Any:
    return lambda x, t: output


def test_the_network_gets_original_timesteps_and_the_noised_sample() -> None:
    diffusion = IDDPM(respacing="50")
    x, noise, output = tensors()
    t = torch.tensor([0, 1, 10, 25, 49])
    seen: list[Tensor] = []

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        seen.extend((x_t, t))
        return output

    diffusion.training_losses(model, x, t, noise)
    abar = torch.from_numpy(IDDPM().schedule.alphas_cumprod)[seen[1]].view(-1, 1, 1, 1)
    assert seen[1].tolist() == [0, 20, 204, 510, 999]
    torch.testing.assert_close(seen[0], abar.sqrt() * x + (1 - abar).sqrt() * noise, rtol=1e-10, atol=0)


def test_the_bound_is_the_kl_of_torch_distributions() -> None:
    diffusion = IDDPM()
    x, noise, output = tensors()
    losses = diffusion.training_losses(constant(output), x, T, noise)
    x_t = diffusion.q_sample(x, T, noise)
    step = diffusion.p_mean_variance(constant(output), x_t, T)
    later = slice(1, None)
    variance = torch.from_numpy(diffusion.schedule.posterior_variance)[T][later].view(-1, 1, 1, 1)
    q = Normal(diffusion.q_posterior_mean(x, x_t, T)[later], variance.sqrt())
    kl = kl_divergence(q, Normal(step.mean[later], step.variance[later].sqrt())).flatten(1).mean(1)
    torch.testing.assert_close(losses["vb"][later], kl / math.log(2), rtol=1e-9, atol=0)
    torch.testing.assert_close(losses["mse"], ((noise - output[:, :4]) ** 2).mean((1, 2, 3)))
    torch.testing.assert_close(losses["loss"], losses["mse"] + losses["vb"])


def test_the_bound_at_step_0_is_the_probability_of_the_8_bit_value() -> None:
    """Against the exact normal distribution; the tanh form is within 4e-4 of it."""
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mean, scale = torch.tensor(0.21, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    got = discretized_gaussian_log_likelihood(x, mean, scale.log()).exp()
    normal = Normal(mean, scale)
    edges = normal.cdf(torch.cat((x[:1] - math.inf, (x[1:] + x[:-1]) / 2, x[-1:] + math.inf)))
    assert (got.sum() - 1).abs() < 1e-6
    assert (got - edges.diff()).abs().max() < 1e-4
    assert discretized_gaussian_log_likelihood(x[:1], mean + 50, scale.log()).exp() == pytest.approx(1e-12)


def test_step_0_of_the_loss_uses_the_likelihood() -> None:
    diffusion = IDDPM()
    x, noise, output = tensors()
    x_t = diffusion.q_sample(x, T, noise)
    step = diffusion.p_mean_variance(constant(output), x_t, T)
    likelihood = discretized_gaussian_log_likelihood(x, step.mean, 0.5 * step.log_variance)[0].mean()
    vb = diffusion.training_losses(constant(output), x, T, noise)["vb"][0]
    assert vb.item() == pytest.approx(-likelihood.item() / math.log(2), rel=1e-12)


@pytest.mark.parametrize("predict_xstart", [False, True])
def test_gradients_go_where_they_belong(predict_xstart: bool) -> None:
    x, noise, output = tensors()
    output.requires_grad_()
    losses = IDDPM(predict_xstart=predict_xstart).training_losses(constant(output), x, T, noise)
    (of_mse,) = torch.autograd.grad(losses["mse"].sum(), output, retain_graph=True)
    (of_vb,) = torch.autograd.grad(losses["vb"].sum(), output)
    assert not of_mse[:, 4:].any()
    assert not of_vb[:, :4].any()
    assert (of_mse[:, :4] != 0).all()
    assert of_vb[1:, 4:].flatten(1).abs().amax(1).min() > 0  # at step 0 the probability may lie on its floor


def test_variants_of_the_loss() -> None:
    x, noise, output = tensors()
    t = torch.tensor([0, 1, 5, 20, 49])
    plain = IDDPM(respacing="50").training_losses(constant(output), x, t, noise)
    rescaled = IDDPM(respacing="50", rescale_learned_sigmas=True)
    torch.testing.assert_close(rescaled.training_losses(constant(output), x, t, noise)["vb"], plain["vb"] * 0.05)

    output.requires_grad_()
    kl = IDDPM(respacing="50", use_kl=True).training_losses(constant(output), x, t, noise)
    torch.testing.assert_close(kl["loss"], plain["vb"] * 50)
    (gradient,) = torch.autograd.grad(kl["loss"].sum(), output)
    assert (gradient[:, :4].flatten(1).abs().amax(1) > 0).all()

    fixed = IDDPM(learn_sigma=False).training_losses(constant(output[:, :4]), x, T, noise)
    assert set(fixed) == {"loss", "mse"}


def test_variances_interpolate_between_the_posterior_and_beta() -> None:
    x, _, _ = tensors()
    s = IDDPM().schedule
    column = lambda a: torch.from_numpy(a)[T].view(-1, 1, 1, 1).expand_as(x)  # noqa: E731
    low, high = torch.cat((x, -torch.ones_like(x)), 1), torch.cat((x, torch.ones_like(x)), 1)
    small = IDDPM().p_mean_variance(constant(low), x, T)
    torch.testing.assert_close(small.log_variance, column(s.posterior_log_variance_clipped))
    large = IDDPM().p_mean_variance(constant(high), x, T)
    torch.testing.assert_close(large.variance, column(s.betas))
    beyond = IDDPM().p_mean_variance(constant(torch.cat((x, 3 * torch.ones_like(x)), 1)), x, T)  # not clamped
    torch.testing.assert_close(beyond.log_variance, 2 * large.log_variance - small.log_variance)
    fixed = IDDPM(learn_sigma=False, sigma_small=True).p_mean_variance(constant(x), x, T)
    torch.testing.assert_close(fixed.variance, column(s.posterior_variance))


def test_a_half_precision_network_gets_float32_losses() -> None:
    x, noise, output = tensors(dtype=torch.float32)
    half = output.bfloat16()
    seen: list[torch.dtype] = []

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t.dtype)
        return half

    losses = IDDPM().training_losses(model, x.bfloat16(), T, noise)
    expected = IDDPM().training_losses(constant(half.double()), x.bfloat16().double(), T, noise.double())
    assert seen == [torch.float32]
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected[name], rtol=2e-4, atol=2e-6)
    assert expected["loss"].dtype == torch.float64


def test_perfect_predictions_have_no_loss_and_recover_the_sample() -> None:
    x, noise, _ = tensors()
    for diffusion, answer in ((IDDPM(), noise), (IDDPM(predict_xstart=True), x)):
        model = constant(torch.cat((answer, -torch.ones_like(x)), 1))
        losses = diffusion.training_losses(model, x, T, noise)
        step = diffusion.p_mean_variance(model, diffusion.q_sample(x, T, noise), T)
        assert losses["mse"].max() == 0
        assert losses["vb"][1:].abs().max() < 1e-9
        torch.testing.assert_close(step.x_start, x, rtol=0, atol=1e-10)


def test_clip_clamps_the_estimate_of_x_0() -> None:
    x, _, output = tensors()
    step = IDDPM().p_mean_variance(constant(output), x * 3, T, clip=True)
    assert step.x_start.abs().max() == 1


def test_ddim_with_eta_1_is_ancestral_sampling_with_the_posterior_variance() -> None:
    diffusion = IDDPM(respacing="50", learn_sigma=False, sigma_small=True)
    x, noise, output = tensors(channels=4)
    t = torch.tensor([0, 1, 5, 20, 49])
    ancestral = diffusion.p_sample(constant(output), x, t, noise)
    ddim = diffusion.ddim_sample(constant(output), x, t, noise, eta=1.0)
    torch.testing.assert_close(ddim, ancestral, rtol=1e-9, atol=1e-9)


def test_ddim_reverse_undoes_a_ddim_step() -> None:
    diffusion = IDDPM(respacing="50", learn_sigma=False)
    x, _, output = tensors(channels=4)
    t = torch.tensor([1, 2, 10, 30, 49])
    previous = diffusion.ddim_sample(constant(output), x, t)
    torch.testing.assert_close(diffusion.ddim_reverse(constant(output), previous, t - 1), x, rtol=1e-9, atol=1e-9)


def test_a_network_with_the_wrong_channels_is_refused() -> None:
    x, noise, output = tensors()
    with pytest.raises(ValueError, match="returned 8 channels for an input of 4; expected 4"):
        IDDPM(learn_sigma=False).training_losses(constant(output), x, T, noise)


def test_build_reads_the_config() -> None:
    diffusion = build(DiffusionConfig(steps=500, schedule="cosine", prediction="x0"), False, respacing="10")
    assert diffusion == IDDPM(500, "squaredcos_cap_v2", "10", predict_xstart=True, learn_sigma=False)
    assert diffusion.num_timesteps == 10
    with pytest.raises(ValueError, match="more than 20 steps"):
        build(DiffusionConfig(steps=10), True)


@pytest.mark.parametrize("steps", [1000, 50])
def test_ancestral_steps_equal_diffusers(steps: int) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        beta_schedule="linear", variance_type="learned_range", clip_sample=False, timestep_spacing="leading"
    )
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = torch.from_numpy(IDDPM().schedule.alphas_cumprod)  # theirs is float32
    diffusion = IDDPM(respacing=f"ddim{steps}")
    assert scheduler.timesteps.tolist() == diffusion.schedule.timestep_map[::-1].tolist()
    x, _, output = tensors()
    x, output = x[:1], output[:1]
    for i in (0, 1, 2, steps // 2, steps - 1):
        t = int(diffusion.schedule.timestep_map[i])
        theirs = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype)
        ours = diffusion.p_sample(constant(output), x, torch.tensor([i]), noise)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_ddim_steps_equal_diffusers(eta: float, prediction: str) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, prediction_type=prediction)
    scheduler.set_timesteps(50)
    scheduler.alphas_cumprod = torch.from_numpy(IDDPM().schedule.alphas_cumprod)
    diffusion = IDDPM(respacing="ddim50", learn_sigma=False, predict_xstart=prediction == "sample")
    x, noise, output = tensors(channels=4)
    for i in (0, 1, 2, 25, 49):
        t = int(diffusion.schedule.timestep_map[i])
        theirs = scheduler.step(output, t, x, eta=eta, variance_noise=noise).prev_sample
        ours = diffusion.ddim_sample(constant(output), x, torch.full((5,), i), noise if eta else None, eta)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
