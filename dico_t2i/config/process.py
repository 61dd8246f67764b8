"""Config sections of the diffusion process and of the samplers that belong to it."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    model_validator,
)

from dico_t2i.config.base import ConfigError, NonNegativeFloat, Positive, PositiveFloat, Probability, Section


class DiffusionConfig(Section):
    """iDDPM (paper, section 4), or rectified flow: the linear path and its velocity (docs/diffusion.md)."""

    kind: Literal["iddpm", "flow"] = "iddpm"
    steps: Positive = 1000  # the network sees timesteps from 0 to this; a flow's are fractional
    schedule: Literal["linear", "cosine"] = "linear"  # iddpm only
    prediction: Literal["epsilon", "x0"] = "epsilon"  # iddpm only; a flow predicts the velocity
    # Of the squared error. iddpm: min_snr; flow: logit_normal, the density of such times, for times drawn uniformly.
    weighting: Literal["none", "min_snr", "logit_normal"] = "none"
    min_snr_gamma: PositiveFloat = 5.0
    timesteps: Literal["uniform", "logit_normal"] = "uniform"  # flow only: how training draws them
    logit_mean: float = 0.0  # of logit_normal, with 0 data and 1 noise: more than 0 is more noise
    logit_std: PositiveFloat = 1.0
    shift: PositiveFloat = 1.0  # flow only: more than 1 moves the drawn times towards noise

    @model_validator(mode="after")
    def _belongs_together(self) -> DiffusionConfig:
        foreign = {"iddpm": "logit_normal", "flow": "min_snr"}[self.kind]
        if self.weighting == foreign:
            raise ValueError(f"weighting: {foreign} is not made for kind: {self.kind}")
        if self.kind == "iddpm" and (self.timesteps != "uniform" or self.shift != 1):
            raise ValueError("timesteps and shift: iddpm draws its steps uniformly; leave them out, or set kind: flow")
        if self.kind == "flow" and self.prediction != "epsilon":
            raise ValueError(f"prediction: {self.prediction} is for kind: iddpm; a flow predicts the velocity")
        if self.weighting == self.timesteps == "logit_normal":
            raise ValueError("weighting: logit_normal takes the place of timesteps: logit_normal; give one of them")
        return self


class SamplerConfig(Section):
    kind: Literal["iddpm", "ddim", "dpm++", "euler", "heun", "euler_sde"] = "iddpm"  # see SAMPLERS
    steps: Positive = 250  # evaluations of the network; heun takes two a step, and one for the last
    guidance: NonNegativeFloat = 1.4  # w of uncond + w (cond - uncond); 1: no guidance
    guidance_channels: Literal["all", "three"] = "all"  # three: as the released code does
    # Times at which to guide, 0 is data and 1 noise; elsewhere the conditional network runs alone, at half the cost.
    guidance_interval: tuple[Probability, Probability] = (0.0, 1.0)
    eta: Probability = 0.0  # ddim only
    shift: PositiveFloat = 1.0  # of a flow's times; more than 1 spends more of the steps near noise

    @model_validator(mode="after")
    def _interval(self) -> SamplerConfig:
        low, high = self.guidance_interval
        if low > high:
            raise ValueError(f"guidance_interval: [{low}, {high}] is the wrong way round; 0 is data, 1 is noise")
        return self


# The samplers of each diffusion.kind. A new one is named here and in SamplerConfig.kind, and gets its function in the
# table of diffusion/samplers.py or diffusion/flow_samplers.py.
SAMPLERS = {"iddpm": ("iddpm", "ddim", "dpm++"), "flow": ("euler", "heun", "dpm++", "euler_sde")}
SAMPLER_NAMES = tuple(dict.fromkeys(name for names in SAMPLERS.values() for name in names))


def check_sampler(diffusion: DiffusionConfig, sampler: SamplerConfig, key: str = "sampler") -> None:
    """Raises ConfigError, naming ``key``, if the sampler does not belong to the process, or cannot take its steps."""
    if sampler.kind not in SAMPLERS[diffusion.kind]:
        known = ", ".join(SAMPLERS[diffusion.kind])
        raise ConfigError(f"{key}.kind: {sampler.kind} does not sample diffusion.kind: {diffusion.kind}; use {known}")
    if diffusion.kind == "iddpm" and sampler.shift != 1:
        raise ConfigError(f"{key}.shift: is for diffusion.kind: flow; leave it out")
    steps = sampler.steps
    if diffusion.kind == "iddpm" and not 2 <= steps <= diffusion.steps:
        raise ConfigError(f"{key}.steps: {steps}, but {sampler.kind} takes 2 to diffusion.steps: {diffusion.steps}")
    if sampler.kind == "heun" and steps % 2 == 0:
        raise ConfigError(f"{key}.steps: heun takes an odd number of evaluations, {steps - 1} or {steps + 1}")
    if sampler.kind == "euler_sde" and steps < 2:
        raise ConfigError(f"{key}.steps: euler_sde takes at least 2")
