"""The diffusion half of the adapter that `check.py` of the golden numbers drives."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dico_t2i.diffusion import IDDPM, ModelFn
from dico_t2i.diffusion.samplers import reverse_loop
from dico_t2i.diffusion.schedule import space_timesteps

__all__ = [
    "ddim_sample",
    "make_diffusion",
    "p_mean_variance",
    "p_sample",
    "q_sample",
    "sample_loop",
    "schedule",
    "space_timesteps",
    "training_losses",
]


def make_diffusion(**kwargs: Any) -> IDDPM:
    return IDDPM(respacing=kwargs.pop("timestep_respacing"), **kwargs)


def schedule(d: IDDPM, name: str) -> np.ndarray:
    if name == "log_one_minus_alphas_cumprod":  # in the golden files, used by nothing here
        return np.log(1 - d.schedule.alphas_cumprod)
    return getattr(d.schedule, name)


def q_sample(d: IDDPM, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    return d.q_sample(x_start, t, noise)


def training_losses(d: IDDPM, model_fn: ModelFn, x_start: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
    return d.training_losses(model_fn, x_start, t, noise)


def p_mean_variance(d: IDDPM, model_fn: ModelFn, x: Tensor, t: Tensor, clip: bool) -> dict[str, Tensor]:
    step = d.p_mean_variance(model_fn, x, t, clip)
    return {
        "mean": step.mean,
        "variance": step.variance,
        "log_variance": step.log_variance,
        "pred_xstart": step.x_start,
    }


def p_sample(d: IDDPM, model_fn: ModelFn, x: Tensor, t: Tensor, clip: bool, noise: Tensor) -> Tensor:
    return d.p_sample(model_fn, x, t, noise, clip)


def ddim_sample(d: IDDPM, model_fn: ModelFn, x: Tensor, t: Tensor, clip: bool, eta: float, noise: Tensor) -> Tensor:
    return d.ddim_sample(model_fn, x, t, noise, eta, clip)


def sample_loop(
    d: IDDPM, model_fn: ModelFn, z: Tensor, kind: str, eta: float, clip: bool, noises: Sequence[Tensor]
) -> Tensor:
    if kind == "p":
        return reverse_loop(d, lambda x, t, k: d.p_sample(model_fn, x, t, noises[k], clip), z)
    return reverse_loop(d, lambda x, t, k: d.ddim_sample(model_fn, x, t, noises[k], eta, clip), z)
