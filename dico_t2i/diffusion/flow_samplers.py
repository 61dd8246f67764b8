"""Samplers of a rectified flow: from noise at time 1 to latents at time 0, given the (guided) velocity.

``sampler.steps`` counts evaluations of the network. "euler" and "dpm++" need one for each step. "heun" needs two,
except for one in the last step, which avoids time 0, where the network is hardly trained: n steps are 2n - 1
evaluations. "euler_sde" needs one for each step, and adds noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from itertools import count, pairwise

import numpy as np
import torch
from torch import Tensor

from dico_t2i.config import SamplerConfig
from dico_t2i.diffusion.flow import Flow, shifted
from dico_t2i.diffusion.given import GivenLatents, StepHook, begin
from dico_t2i.diffusion.process import ModelFn

Velocity = Callable[[Tensor, float], Tensor]
Steps = Generator[Tensor, Tensor, None]  # yields the latents after each step, and is sent those to continue with
StepNoise = Callable[[int], Tensor]
Progress = Callable[[int, int], None]

# From this time the stochastic sampler takes one step without noise to the data, as REPA's sampler does.
_LAST_NOISY_TIME = 0.04


def sample_flow(
    flow: Flow,
    sampler: SamplerConfig,
    model_fn: ModelFn,
    x: Tensor,
    step_noise: StepNoise,
    progress: Progress | None = None,
    on_step: StepHook | None = None,
    given: GivenLatents | None = None,
) -> Tensor:
    """Latents (N, C, H, W) from standard normal x of the same shape; arguments as in ``samplers.sample``."""
    left, x, on_step = begin(
        given, x, flow_times(sampler)[:-1], lambda time: shifted(time, 1 / sampler.shift), _on_path, on_step
    )
    total = 2 * len(left) - 1 if sampler.kind == "heun" else len(left)
    evaluations = count(1)

    def velocity(x: Tensor, time: float) -> Tensor:
        t = torch.full((len(x),), flow.steps * time, dtype=torch.float64, device=x.device)
        v = flow.velocity(model_fn, x, t)
        if progress:
            progress(next(evaluations), total)
        return v

    times = [*left, 0.0]
    return _run(_SOLVERS[sampler.kind](velocity, x, times, step_noise), times, on_step)


def _on_path(time: float, latents: Tensor, noise: Tensor) -> Tensor:
    """The latents at a time of the linear path."""
    return (1 - time) * latents + time * noise


def _run(steps: Steps, times: Sequence[float], on_step: StepHook | None) -> Tensor:
    """Run all steps and return the last latents; the result of on_step replaces the latents after each step."""
    x = next(steps)
    for k, time in enumerate(times[:-2]):
        x = steps.send(on_step(k, time, x) if on_step else x)
    return on_step(len(times) - 2, times[-2], x) if on_step else x


def flow_times(sampler: SamplerConfig) -> list[float]:
    """The times of a sampler's steps, from 1 down to 0: evenly spaced, then moved by ``sampler.shift``."""
    if sampler.kind == "euler_sde":
        even = np.append(np.linspace(1, _LAST_NOISY_TIME, sampler.steps), 0.0)
    else:
        even = np.linspace(1, 0, (sampler.steps + 1) // 2 + 1 if sampler.kind == "heun" else sampler.steps + 1)
    return [shifted(float(time), sampler.shift) for time in even]


def _euler(velocity: Velocity, x: Tensor, times: Sequence[float], _: StepNoise) -> Steps:
    for now, then in pairwise(times):
        x = yield x + (then - now) * velocity(x, now)


def _heun(velocity: Velocity, x: Tensor, times: Sequence[float], _: StepNoise) -> Steps:
    """Heun's method: uses the mean of the velocities at both ends of a step, the second one after an Euler step."""
    for now, then in pairwise(times):
        slope = velocity(x, now)
        if then > 0:
            slope = (slope + velocity(x + (then - now) * slope, then)) / 2
        x = yield x + (then - now) * slope


def _flow_dpm_solver(velocity: Velocity, x: Tensor, times: Sequence[float], _: StepNoise) -> Steps:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) with alpha = 1 - t and sigma = t.

    Each step is exact for a constant estimate of x_0, which is extrapolated from the last two estimates, linearly in
    log(alpha/sigma). That is infinite at both ends, so the first two steps and the last do not extrapolate.
    """
    before, earlier = 1.0, x
    for now, then in pairwise(times):
        x_start = x - now * velocity(x, now)
        estimate = x_start
        if before < 1 and then > 0:
            step, last_step = (_half_log_snr(b) - _half_log_snr(a) for a, b in ((now, then), (before, now)))
            estimate = x_start + step / (2 * last_step) * (x_start - earlier)
        before, earlier = now, x_start
        x = yield then / now * x + (1 - then / now) * estimate


def _half_log_snr(time: float) -> float:
    return math.log1p(-time) - math.log(time)


def _euler_sde(velocity: Velocity, x: Tensor, times: Sequence[float], step_noise: StepNoise) -> Steps:
    """Euler-Maruyama on dx = (v - w/2 score) dt + sqrt(w) dW with w = 2t, which has the flow's marginals (SiT).

    The score is -E[noise | x_t] / t, and E[noise | x_t] = x_t + (1 - t) v.
    """
    for k, (now, then) in enumerate(pairwise(times)):
        v = velocity(x, now)
        noise = x + (1 - now) * v
        x = x + (then - now) * (v + noise)
        if then > 0:
            x = x + math.sqrt(2 * now * (now - then)) * step_noise(k)
        x = yield x


_SOLVERS = {"euler": _euler, "heun": _heun, "dpm++": _flow_dpm_solver, "euler_sde": _euler_sde}
