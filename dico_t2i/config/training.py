"""Config sections of training: optimizer, checkpoints, guard, logging, previews, validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt, field_validator, model_validator

from dico_t2i.config.base import (
    BelowOne,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Probability,
    Section,
    Span,
)
from dico_t2i.config.process import SamplerConfig
from dico_t2i.config.yaml12 import Flag, Text


class OptimizerConfig(Section):
    lr: PositiveFloat = 1e-4
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip: NonNegativeFloat = 0.0  # largest gradient norm; 0: no clipping
    warmup: Span | None = None
    schedule: Literal["constant", "cosine"] = "constant"
    ema: tuple[Probability, ...] = (0.9999,)  # decays per step

    @field_validator("ema")
    @classmethod
    def _names_differ(cls, decays: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{decay:g}" for decay in decays}) < len(decays):
            raise ValueError("two decays have the same six digits, by which averages are named")
        return decays


class ProfileConfig(Section):
    """A trace by torch.profiler of rank 0, in the run folder under profile/."""

    start: NonNegative  # step before which it begins; the first ones, which warm up, tell little
    steps: Positive = 3


class TrainConfig(Section):
    duration: Span
    global_batch: Positive = 256
    micro_batch: Positive = 32  # at most this many samples per rank and pass; the rest is gradient accumulation
    precision: Literal["bf16", "fp32"] = "bf16"
    zero_stage: Annotated[StrictInt, Field(ge=0, le=3)] = 1
    compile: Literal["off", "blocks"] = "off"  # blocks: torch.compile, one kind of block after the other
    hang_timeout_s: PositiveFloat = 600.0  # without progress of a rank, after which the job ends and names it
    first_step_timeout_s: PositiveFloat = 1800.0  # the same for the first step, for saves and for previews
    profile: ProfileConfig | None = None  # none: no trace

    @model_validator(mode="after")
    def _weights_stay_in_compiled_blocks(self) -> TrainConfig:
        if self.compile != "off" and self.zero_stage == 3:
            raise ValueError(
                f"compile: {self.compile} does not work with zero_stage: 3, whose weights come and go inside a block;"
                " take stage 1 or 2, or compile: off"
            )
        return self


class CheckpointConfig(Section):
    every: Span = Span(minutes=30)
    keep_last: Positive = 3
    keep_every: Span | None = None  # these are never deleted
    keep_best: Flag = False  # nor the one with the lowest mean loss since the save before it
    background: Flag = True  # write while training goes on


class GuardConfig(Section):
    """What to do about steps that would spoil the weights."""

    spike: NonNegativeFloat = 0.0  # skip a gradient norm of more than so many times its running mean; 0: none
    max_skipped: Positive = 10  # skipped steps in a row after which the run goes back to its last checkpoint
    max_rollbacks: NonNegative = 1  # times it may do so; then it stops


class LogConfig(Section):
    every: Span = Span(steps=50)
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online with a key, else offline
    wandb_project: Text = "dico_t2i"
    wandb_artifacts: Flag = False  # at the end, the manifest (not the weights) of the newest checkpoint
    tensorboard: Flag = False  # event files in the run folder; needs the package tensorboard


class PreviewConfig(Section):
    """Sample grids during training."""

    every: Span | None = None  # none: no grids
    prompts: tuple[Text, ...] = ()
    labels: tuple[NonNegative, ...] = ()
    sampler: SamplerConfig = SamplerConfig(kind="dpm++", steps=20, guidance=3.0)  # keys left out are as here

    @field_validator("sampler", mode="before")
    @classmethod
    def _keys_left_out(cls, value: Any) -> Any:
        default = cls.model_fields["sampler"].default.model_dump(exclude_unset=True)
        return {**default, **value} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _something_to_sample(self) -> PreviewConfig:
        if self.every is not None and not self.prompts and not self.labels:
            raise ValueError("every: give prompts or labels to sample as well")
        return self


class ValidationConfig(Section):
    """The loss on held-out data, with the averaged weights, at fixed timesteps; see training/validation.py."""

    every: Span
    path: Text  # shards made like those of data.path, of other images
    samples: Positive = 2048  # at least so many: whole batches are taken
    bands: Positive = 8  # equal bands of timesteps, each seen at its middle
