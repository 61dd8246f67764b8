"""Config sections for the diffusion process and its samplers."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    model_validator,
)

from dico_t2i.config.base import ConfigError, NonNegativeFloat, Positive, PositiveFloat, Probability, Section


class DiffusionConfig(Section):
    """The diffusion process: iDDPM (paper, section 4), or rectified flow on the linear path (docs/diffusion.md)."""

    kind: Literal["iddpm", "flow"] = "iddpm"  # The diffusion process.
    # The number of timesteps: the network sees timesteps from 0 to this number; those of a flow are fractional.
    steps: Positive = 1000
    # For iddpm: the noise schedule; scaled_linear is Stable Diffusion's.
    schedule: Literal["linear", "cosine", "scaled_linear"] = "linear"
    # For iddpm: what the network predicts; a flow always predicts the velocity.
    prediction: Literal["epsilon", "x0"] = "epsilon"
    # The weight of the squared error: iddpm takes min_snr; a flow takes logit_normal, the density of logit-normal
    # times, for times that are drawn uniformly.
    weighting: Literal["none", "min_snr", "logit_normal"] = "none"
    min_snr_gamma: PositiveFloat = 5.0  # The gamma of weighting: min_snr.
    # For flow: the distribution that training draws its times from.
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    # The mean of logit_normal, where time 0 is data and 1 is noise; more than 0 means more noise.
    logit_mean: float = 0.0
    logit_std: PositiveFloat = 1.0  # The standard deviation of logit_normal.
    shift: PositiveFloat = 1.0  # For flow: more than 1 moves the drawn times towards noise.

    @model_validator(mode="after")
    def _belongs_together(self) -> DiffusionConfig:
        foreign = {"iddpm": "logit_normal", "flow": "min_snr"}[self.kind]
        if self.weighting == foreign:
            raise ValueError(f"weighting: {foreign} does not apply to kind: {self.kind}")
        if self.kind == "iddpm" and (self.timesteps != "uniform" or self.shift != 1):
            raise ValueError("timesteps and shift: iddpm draws its steps uniformly; leave them out, or set kind: flow")
        if self.kind == "flow" and self.prediction != "epsilon":
            raise ValueError(f"prediction: {self.prediction} needs kind: iddpm; a flow predicts the velocity")
        if self.weighting == self.timesteps == "logit_normal":
            raise ValueError("weighting: logit_normal replaces timesteps: logit_normal; give only one of them")
        return self


class SamplerConfig(Section):
    """How samples are drawn: the sampler, its number of steps, and guidance."""

    # The sampler: iddpm, ddim and dpm++ for iddpm; euler, heun, dpm++ and euler_sde for flow.
    kind: Literal["iddpm", "ddim", "dpm++", "euler", "heun", "euler_sde"] = "iddpm"
    # The number of evaluations of the network; heun needs two for each step and one for the last.
    steps: Positive = 250
    guidance: NonNegativeFloat = 1.4  # The guidance scale w in uncond + w (cond - uncond); 1 turns guidance off.
    # The channels that are guided: all, or the first three as in the released code.
    guidance_channels: Literal["all", "three"] = "all"
    # The times at which to guide, where 0 is data and 1 is noise; at other times the conditional network runs alone, at
    # half the cost.
    guidance_interval: tuple[Probability, Probability] = (0.0, 1.0)
    eta: Probability = 0.0  # For ddim: the share of fresh noise in each step; 0 is deterministic.
    shift: PositiveFloat = 1.0  # For flow: more than 1 spends more of the steps near noise.

    @model_validator(mode="after")
    def _interval(self) -> SamplerConfig:
        low, high = self.guidance_interval
        if low > high:
            raise ValueError(f"guidance_interval: [{low}, {high}] is not in increasing order; 0 is data, 1 is noise")
        return self


# The samplers of each diffusion.kind. A new sampler is named here and in SamplerConfig.kind; its function goes into the
# table of diffusion/samplers.py or diffusion/flow_samplers.py.
SAMPLERS = {"iddpm": ("iddpm", "ddim", "dpm++"), "flow": ("euler", "heun", "dpm++", "euler_sde")}
SAMPLER_NAMES = tuple(dict.fromkeys(name for names in SAMPLERS.values() for name in names))


def check_sampler(diffusion: DiffusionConfig, sampler: SamplerConfig, key: str = "sampler") -> None:
    """Raise ConfigError, naming ``key``, if the sampler or its number of steps does not fit the process."""
    if sampler.kind not in SAMPLERS[diffusion.kind]:
        known = ", ".join(SAMPLERS[diffusion.kind])
        raise ConfigError(f"{key}.kind: {sampler.kind} cannot sample diffusion.kind: {diffusion.kind}; use {known}")
    if diffusion.kind == "iddpm" and sampler.shift != 1:
        raise ConfigError(f"{key}.shift: it is for diffusion.kind: flow; leave it out")
    steps = sampler.steps
    if diffusion.kind == "iddpm" and not 2 <= steps <= diffusion.steps:
        raise ConfigError(f"{key}.steps: {steps}, but {sampler.kind} takes 2 to diffusion.steps: {diffusion.steps}")
    if sampler.kind == "heun" and steps % 2 == 0:
        raise ConfigError(f"{key}.steps: heun takes an odd number of evaluations, such as {steps - 1} or {steps + 1}")
    if sampler.kind == "euler_sde" and steps < 2:
        raise ConfigError(f"{key}.steps: euler_sde takes at least 2 steps")
