"""Rectified flow: a straight path from data to noise, and the network predicts the velocity along it.

    x_t = (1 - t) x_0 + t noise,    dx_t/dt = v = noise - x_0,    t from 0 (data) to 1 (noise)

This is the convention of the papers on rectified flow in latent space (SiT, Ma et al. 2024, with its linear path;
Stable Diffusion 3, Esser et al. 2024) and of REPA's code; SiT's own code runs time in the other direction. The
network sees t times ``steps``, since the sinusoids of its timestep embedding are made for 0..999.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from dico_t2i.config import DiffusionConfig
from dico_t2i.diffusion.process import ModelFn, full_precision, mean_per_sample
from dico_t2i.randomness import normal, uniform

Time = TypeVar("Time", float, Tensor)


@dataclass(frozen=True)
class Flow:
    """The linear path, the distribution of its times in training, and the weights of their losses.

    timesteps "logit_normal": logit(t) ~ N(logit_mean, logit_std^2); ``shift`` then moves the times towards noise.
    weighting "logit_normal" multiplies the losses by the density of that distribution instead, for times that are
    uniform before the shift.
    """

    steps: int = 1000
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    weighting: Literal["none", "logit_normal"] = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0

    def draw_timesteps(self, seed: int, position: Tensor) -> Tensor:
        """Draw fractional timesteps in 0..steps, float64. position (N,) int64 -> (N,)."""
        if self.timesteps == "uniform":
            time = uniform(seed, "timestep", position)
        else:
            draw = normal(seed, "timestep", position).double()
            time = torch.sigmoid(self.logit_mean + self.logit_std * draw)
        return self.steps * shifted(time, self.shift)

    def training_losses(self, model_fn: ModelFn, x_start: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Losses of each sample, (N,): "mse" of the velocity, and "loss", the weighted mse.

        t (N,) in 0..steps, of any dtype. Raises ValueError if the network has the wrong number of channels.
        """
        x_start, noise = full_precision(x_start), full_precision(noise)
        time = t.double() / self.steps
        noisy = time.to(x_start.dtype).view(-1, 1, 1, 1)
        velocity = self.velocity(model_fn, (1 - noisy) * x_start + noisy * noise, t)
        mse = mean_per_sample((noise - x_start - velocity) ** 2)
        if self.weighting == "none":
            return {"loss": mse, "mse": mse}
        weight = logit_normal_density(shifted(time, 1 / self.shift), self.logit_mean, self.logit_std)
        return {"loss": weight.to(mse.dtype) * mse, "mse": mse}

    def velocity(self, model_fn: ModelFn, x: Tensor, t: Tensor) -> Tensor:
        """Run the network and return its velocity (N, C, H, W). x (N, C, H, W), t (N,) in 0..steps."""
        output = full_precision(model_fn(x, t.to(x.dtype)))
        if output.shape != x.shape:
            raise ValueError(
                f"the network returned {tuple(output.shape)} for an input of {tuple(x.shape)}; the velocity of a flow"
                " has the shape of its input (model.learn_sigma must be false)"
            )
        return output


def build_flow(config: DiffusionConfig) -> Flow:
    """The flow that a config describes."""
    assert config.weighting != "min_snr"  # refused by the config
    return Flow(
        steps=config.steps,
        timesteps=config.timesteps,
        weighting=config.weighting,
        logit_mean=config.logit_mean,
        logit_std=config.logit_std,
        shift=config.shift,
    )


def shifted(time: Time, shift: float) -> Time:
    """Times in 0..1 moved towards noise by adding log(shift) to their logits (Stable Diffusion 3)."""
    return shift * time / (1 + (shift - 1) * time)


def logit_normal_density(time: Tensor, mean: float, std: float) -> Tensor:
    """The density, elementwise, of t in 0..1 whose logit is N(mean, std^2) (Stable Diffusion 3)."""
    time = time.clamp(2**-33, 1 - 2**-33)  # 0 is drawn once in 2^32 times
    normal = (torch.logit(time) - mean) / std
    return torch.exp(-0.5 * normal**2) / (std * math.sqrt(2 * math.pi) * time * (1 - time))
