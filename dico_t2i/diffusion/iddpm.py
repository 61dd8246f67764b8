"""iDDPM: forward process, training losses and single reverse steps.

Sources: DDPM (Ho et al. 2020), learned-range variance and hybrid loss of iDDPM (Nichol and Dhariwal 2021),
DDIM (Song et al. 2021). Timesteps ``t``, (N,) int64, count the kept steps of the schedule; the network
receives the original timesteps. Images and latents are (N, C, H, W). Arithmetic is float32, or float64 for float64
inputs: coefficients are looked up in float64, and half-precision network outputs are converted first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dico_t2i.config import DiffusionConfig
from dico_t2i.diffusion.process import ModelFn, full_precision, mean_per_sample
from dico_t2i.diffusion.schedule import Schedule, make_schedule
from dico_t2i.randomness import integers


class StepDistribution(NamedTuple):
    """The network's p(x_{t-1} | x_t) and its estimate of x_0; each (N, C, H, W)."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x_start: Tensor


@dataclass(frozen=True)
class IDDPM:
    """A diffusion process and what the network predicts about it.

    respacing keeps some of the ``diffusion_steps`` (see ``schedule.space_timesteps``). The network predicts
    the noise, or x_0 with predict_xstart. With learn_sigma, its second C channels interpolate the log-variance
    between the posterior's and beta (iDDPM, equation 15); otherwise the variance is beta, or the posterior's
    with sigma_small. The loss is the mean squared error, plus the variational bound if the variance is learned;
    rescale_learned_sigmas multiplies the bound by (kept steps)/1000. With use_kl the loss is the whole bound,
    times the number of kept steps. With min_snr_gamma the squared error, but not the bound, is weighted by
    Min-SNR (see ``min_snr_weights``).
    """

    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    respacing: str = ""
    predict_xstart: bool = False
    learn_sigma: bool = True
    sigma_small: bool = False
    rescale_learned_sigmas: bool = False
    use_kl: bool = False
    min_snr_gamma: float | None = None

    @cached_property
    def schedule(self) -> Schedule:
        return make_schedule(self.diffusion_steps, self.noise_schedule, self.respacing)

    @property
    def num_timesteps(self) -> int:
        return len(self.schedule)

    def draw_timesteps(self, seed: int, position: Tensor) -> Tensor:
        """Draw kept steps uniformly, int64. position (N,) int64 -> (N,)."""
        return integers(seed, "timestep", position, self.num_timesteps)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw x_t from the forward process (DDPM, equation 4)."""
        return self._times("sqrt_alphas_cumprod", t, x_start) + self._times("sqrt_one_minus_alphas_cumprod", t, noise)

    def q_posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (DDPM, equation 7)."""
        return self._times("posterior_mean_coef1", t, x_start) + self._times("posterior_mean_coef2", t, x_t)

    def training_losses(self, model_fn: ModelFn, x_start: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Losses of each sample, (N,): "loss", and its parts "mse" and "vb" (bits per dimension) if any.

        "mse" is the unweighted squared error. Except with use_kl, vb has no gradient into the prediction channels, and
        mse has none into the variance channels (iDDPM, section 3.1). Nothing waits for the device once the schedule is
        on it.
        Raises ValueError if the network has the wrong number of channels.
        """
        x_start, noise = full_precision(x_start), full_precision(noise)
        x_t = self.q_sample(x_start, t, noise)
        prediction, variance_channels = self.predict(model_fn, x_t, t)
        if self.use_kl:
            vb = self._vb(prediction, variance_channels, x_start, x_t, t)
            return {"loss": vb * self.num_timesteps, "vb": vb}
        mse = mean_per_sample(((x_start if self.predict_xstart else noise) - prediction) ** 2)
        weighed = mse if self.min_snr_gamma is None else self.min_snr_weights(t).to(mse.dtype) * mse
        if not self.learn_sigma:
            return {"loss": weighed, "mse": mse}
        vb = self._vb(prediction.detach(), variance_channels, x_start, x_t, t)
        if self.rescale_learned_sigmas:
            vb = vb * (self.num_timesteps / 1000)
        return {"loss": weighed + vb, "mse": mse, "vb": vb}

    def min_snr_weights(self, t: Tensor) -> Tensor:
        """min(SNR, gamma) if x_0 is predicted, min(SNR, gamma)/SNR for the noise (Hang et al. 2023); (N,) float64.

        Both are min(SNR, gamma) times the squared error of x_0, where SNR = abar / (1 - abar).
        """
        abar = self._at("alphas_cumprod", t).flatten()
        snr = abar / (1 - abar)
        capped = snr.clamp(max=self.min_snr_gamma)
        return capped if self.predict_xstart else capped / snr

    def p_mean_variance(self, model_fn: ModelFn, x: Tensor, t: Tensor, clip: bool = False) -> StepDistribution:
        """p(x_{t-1} | x_t); clip clamps the estimate of x_0 to [-1, 1], which suits pixels, not latents."""
        return self._distribution(*self.predict(model_fn, x, t), x, t, clip)

    def p_sample(self, model_fn: ModelFn, x: Tensor, t: Tensor, noise: Tensor, clip: bool = False) -> Tensor:
        """x_{t-1} by ancestral sampling; ``noise`` is standard normal and is not added at the last step t = 0."""
        step = self.p_mean_variance(model_fn, x, t, clip)
        return step.mean + _unless_last(t, step.mean) * (0.5 * step.log_variance).exp() * noise

    def ddim_sample(
        self,
        model_fn: ModelFn,
        x: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        eta: float = 0.0,
        clip: bool = False,
    ) -> Tensor:
        """x_{t-1} by DDIM (DDIM, equation 12). eta in [0, 1]: 0 is deterministic and needs no noise."""
        x_start = self.p_mean_variance(model_fn, x, t, clip).x_start
        sigma = eta * self._at("posterior_variance", t).sqrt()
        x_prev = self._towards("alphas_cumprod_prev", sigma, x_start, x, t)
        return x_prev if noise is None else x_prev + sigma.to(x_prev.dtype) * noise

    def ddim_reverse(self, model_fn: ModelFn, x: Tensor, t: Tensor, clip: bool = False) -> Tensor:
        """x_{t+1} by the deterministic DDIM run backwards: encodes x_0 towards noise."""
        x_start = self.p_mean_variance(model_fn, x, t, clip).x_start
        return self._towards("alphas_cumprod_next", torch.zeros_like(self._at("betas", t)), x_start, x, t)

    def _towards(self, alphas: str, sigma: Tensor, x_start: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The mean of DDIM's step from x_t to noise level ``alphas``, leaving room for noise of std sigma."""
        alpha = self._at(alphas, t)
        epsilon = self._times("sqrt_recip_alphas_cumprod", t, x) - x_start
        epsilon = epsilon / self._at("sqrt_recipm1_alphas_cumprod", t).to(x_start.dtype)
        direction = (1 - alpha - sigma**2).sqrt()
        return alpha.sqrt().to(x_start.dtype) * x_start + direction.to(x_start.dtype) * epsilon

    def predict(self, model_fn: ModelFn, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the network and return its prediction (N, C, H, W) and variance channels (N, C, H, W) or None."""
        output = full_precision(model_fn(x, self._tables(t.device)["timestep_map"][t]))
        channels = x.shape[1]
        expected = channels * (2 if self.learn_sigma else 1)
        if output.shape[1] != expected:
            raise ValueError(
                f"the network returned {output.shape[1]} channels for an input of {channels}; expected {expected}"
                f" with learn_sigma={self.learn_sigma}"
            )
        return output[:, :channels], output[:, channels:] if self.learn_sigma else None

    def _distribution(
        self, prediction: Tensor, variance_channels: Tensor | None, x: Tensor, t: Tensor, clip: bool
    ) -> StepDistribution:
        x_start = prediction
        if not self.predict_xstart:
            x_start = self._times("sqrt_recip_alphas_cumprod", t, x) - self._times(
                "sqrt_recipm1_alphas_cumprod", t, prediction
            )
        if clip:
            x_start = x_start.clamp(-1, 1)
        variance, log_variance = self._variance(variance_channels, t, x_start)
        return StepDistribution(self.q_posterior_mean(x_start, x, t), variance, log_variance, x_start)

    def _variance(self, channels: Tensor | None, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        if channels is not None:
            fraction = (channels + 1) / 2  # not clamped, as in iDDPM
            log_variance = self._times("log_betas", t, fraction) + self._times(
                "posterior_log_variance_clipped", t, 1 - fraction
            )
            return log_variance.exp(), log_variance
        if self.sigma_small:
            variance = self._at("posterior_variance", t)
            log_variance = self._at("posterior_log_variance_clipped", t)
        else:
            variance = self._at("fixed_large_variance", t)
            log_variance = variance.log()
        return variance.to(like.dtype).expand_as(like), log_variance.to(like.dtype).expand_as(like)

    def _vb(
        self, prediction: Tensor, variance_channels: Tensor | None, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """The term of the bound for step t in bits per dimension, (N,) (DDPM, equation 5)."""
        step = self._distribution(prediction, variance_channels, x_t, t, clip=False)
        true_mean = self.q_posterior_mean(x_start, x_t, t)
        true_log_variance = self._at("posterior_log_variance_clipped", t).to(x_t.dtype)
        kl = normal_kl(true_mean, true_log_variance, step.mean, step.log_variance)
        likelihood = discretized_gaussian_log_likelihood(x_start, step.mean, 0.5 * step.log_variance)
        nats = torch.where(t == 0, -mean_per_sample(likelihood), mean_per_sample(kl))
        return nats / math.log(2)

    def _at(self, name: str, t: Tensor) -> Tensor:
        """The schedule's coefficients ``name`` at t, (N, 1, 1, 1), float64."""
        return self._tables(t.device)[name][t].view(-1, 1, 1, 1)

    def _times(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        x = full_precision(x)
        return self._at(name, t).to(x.dtype) * x

    def _tables(self, device: torch.device) -> dict[str, Tensor]:
        """The schedule on ``device``, which is copied there once."""
        if device not in self._tables_by_device:
            self._tables_by_device[device] = {
                name: torch.from_numpy(array).to(device) for name, array in vars(self.schedule).items()
            }
        return self._tables_by_device[device]

    @cached_property
    def _tables_by_device(self) -> dict[torch.device, dict[str, Tensor]]:
        return {}


def build(config: DiffusionConfig, learn_sigma: bool, respacing: str = "") -> IDDPM:
    """The process that a config describes; respacing as in ``schedule.space_timesteps``."""
    diffusion = IDDPM(
        diffusion_steps=config.steps,
        noise_schedule={"cosine": "squaredcos_cap_v2"}.get(config.schedule, config.schedule),
        respacing=respacing,
        predict_xstart=config.prediction == "x0",
        learn_sigma=learn_sigma,
        min_snr_gamma=config.min_snr_gamma if config.weighting == "min_snr" else None,
    )
    _ = diffusion.schedule  # so that an impossible schedule raises here and not in the first step
    return diffusion


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) of diagonal Gaussians, elementwise, in nats."""
    return 0.5 * (
        -1
        + log_variance2
        - log_variance1
        + (log_variance1 - log_variance2).exp()
        + (mean1 - mean2) ** 2 * (-log_variance2).exp()
    )


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """The log-probability, elementwise, of x's bin of half-width 1/255, in nats (DDPM, equation 13).

    The bins at -1 and 1 are open-ended; probabilities are floored at 1e-12.
    """
    centred, inverse_scale = x - mean, (-log_scale).exp()
    below_upper = _approximate_cdf((centred + 1 / 255) * inverse_scale)
    below_lower = _approximate_cdf((centred - 1 / 255) * inverse_scale)
    probability = torch.where(
        x < -0.999, below_upper, torch.where(x > 0.999, 1 - below_lower, below_upper - below_lower)
    )
    return probability.clamp(min=1e-12).log()


def _approximate_cdf(x: Tensor) -> Tensor:
    """The standard normal's distribution function, within 4e-4 (the tanh form known from GELU)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _unless_last(t: Tensor, like: Tensor) -> Tensor:
    """0 where t is the last step of sampling, else 1; (N, 1, 1, 1)."""
    return (t != 0).to(like.dtype).view(-1, 1, 1, 1)
