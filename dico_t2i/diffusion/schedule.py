"""Noise schedules in float64, and respacing: keeping some of the timesteps and recomputing the rest.

Notation of DDPM (Ho et al. 2020): q(x_t | x_0) = N(sqrt(abar_t) x_0, 1 - abar_t), abar_t = prod(1 - beta_s).
The learned variance and the cosine schedule are those of iDDPM (Nichol and Dhariwal 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Schedule:
    """Coefficients of the kept steps, all of shape (kept,), in ascending order of time, float64.

    timestep_map (int64) holds the original timestep of each kept step. ``posterior_*`` belong to
    q(x_{t-1} | x_t, x_0) (DDPM, equations 6 and 7). Its variance is 0 at the first step, where the clipped
    logarithm uses the variance of the second step. So does ``fixed_large_variance``, which is beta at all other steps.
    """

    timestep_map: NDArray[np.int64]
    betas: Floats
    log_betas: Floats
    alphas_cumprod: Floats
    alphas_cumprod_prev: Floats
    alphas_cumprod_next: Floats
    sqrt_alphas_cumprod: Floats
    sqrt_one_minus_alphas_cumprod: Floats
    sqrt_recip_alphas_cumprod: Floats
    sqrt_recipm1_alphas_cumprod: Floats
    posterior_mean_coef1: Floats
    posterior_mean_coef2: Floats
    posterior_variance: Floats
    posterior_log_variance_clipped: Floats
    fixed_large_variance: Floats

    def __len__(self) -> int:
        return len(self.betas)


def make_schedule(steps: int, name: str, respacing: str = "") -> Schedule:
    """The schedule of the timesteps that ``respacing`` keeps out of ``steps`` (see ``space_timesteps``).

    name: "linear", "squaredcos_cap_v2" or "scaled_linear". Raises ValueError for impossible combinations.
    """
    kept = np.array(space_timesteps(steps, respacing), dtype=np.int64)
    if len(kept) < 2:
        raise ValueError(f"a diffusion needs at least 2 timesteps, but {len(kept)} of {steps} are kept")
    abar = np.cumprod(1 - noise_betas(steps, name), dtype=np.float64)
    return _schedule_of(abar[kept], kept)


def noise_betas(steps: int, name: str) -> Floats:
    """beta_t of the forward process, (steps,), float64.

    "linear" runs from 1e-4 to 0.02 in 1000 steps, and is scaled for other numbers of steps to the same final noise.
    "squaredcos_cap_v2" is iDDPM's equation 17. "scaled_linear" is Stable Diffusion's: sqrt(beta) is linear.
    """
    if name == "linear":
        betas: Floats = np.linspace(1e-4, 0.02, steps) * (1000 / steps)
        if betas[-1] >= 1:
            raise ValueError(f"a linear schedule needs more than 20 steps, not {steps} (beta would reach 1)")
        return betas
    if name == "squaredcos_cap_v2":
        time = np.arange(steps + 1) / steps
        abar = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - abar[1:] / abar[:-1], 0.999)
    if name == "scaled_linear":
        squared: Floats = np.linspace(0.00085**0.5, 0.012**0.5, steps) ** 2
        return np.minimum(squared * (1000 / steps), 0.999)
    raise ValueError(f"noise schedule {name!r} is not one of linear, squaredcos_cap_v2, scaled_linear")


def space_timesteps(steps: int, spec: str) -> list[int]:
    """The timesteps of range(steps) that ``spec`` keeps, ascending.

    "" keeps all. "a,b,c" divides range(steps) into equal sections, and keeps a, b and c steps of them, evenly
    spaced, with the first and the last. "ddimN" keeps N steps from 0 on, at the smallest fixed stride that gives
    exactly N. Raises ValueError if that is impossible.
    """
    if spec.startswith("ddim"):
        return _fixed_stride(steps, int(spec.removeprefix("ddim")))
    counts = [int(count) for count in spec.split(",")] if spec else [steps]
    kept, start = [], 0
    for section, count in enumerate(counts):
        size = steps // len(counts) + (section < steps % len(counts))
        kept += [start + offset for offset in _even_offsets(size, count)]
        start += size
    return kept


def _fixed_stride(steps: int, count: int) -> list[int]:
    for stride in range(1, steps):
        if len(range(0, steps, stride)) == count:
            return list(range(0, steps, stride))
    raise ValueError(f"no fixed stride takes exactly {count} of {steps} timesteps")


def _even_offsets(size: int, count: int) -> list[int]:
    if not 0 <= count <= size:
        raise ValueError(f"cannot keep {count} timesteps of a section of {size}")
    stride = (size - 1) / (count - 1) if count > 1 else 1.0
    # Repeated addition instead of a product, as in the released code, so that ties are rounded in the same way.
    offsets, position = [], 0.0
    for _ in range(count):
        offsets.append(round(position))
        position += stride
    return offsets


def _schedule_of(kept_cumprod: Floats, timestep_map: NDArray[np.int64]) -> Schedule:
    """The schedule whose steps pass through the given values of abar."""
    before = np.append(1.0, kept_cumprod[:-1])
    betas = 1 - kept_cumprod / before
    abar = np.cumprod(1 - betas)
    abar_prev = np.append(1.0, abar[:-1])
    variance = betas * (1 - abar_prev) / (1 - abar)
    return Schedule(
        timestep_map=timestep_map,
        betas=betas,
        log_betas=np.log(betas),
        alphas_cumprod=abar,
        alphas_cumprod_prev=abar_prev,
        alphas_cumprod_next=np.append(abar[1:], 0.0),
        sqrt_alphas_cumprod=np.sqrt(abar),
        sqrt_one_minus_alphas_cumprod=np.sqrt(1 - abar),
        sqrt_recip_alphas_cumprod=np.sqrt(1 / abar),
        sqrt_recipm1_alphas_cumprod=np.sqrt(1 / abar - 1),
        posterior_mean_coef1=betas * np.sqrt(abar_prev) / (1 - abar),
        posterior_mean_coef2=(1 - abar_prev) * np.sqrt(1 - betas) / (1 - abar),
        posterior_variance=variance,
        posterior_log_variance_clipped=np.log(np.append(variance[1], variance[1:])),
        fixed_large_variance=np.append(variance[1], betas[1:]),
    )
