"""The whole config of a run, and the checks that look at several of its sections at once."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import Field, model_validator

from dico_t2i.config.base import ConfigError, Section, Seed
from dico_t2i.config.cluster import ClusterConfig
from dico_t2i.config.data import DataConfig
from dico_t2i.config.encoders import AlignmentConfig, AutoencoderConfig, TextEncoderConfig
from dico_t2i.config.networks import ModelConfig, SizedConfig, UViTConfig
from dico_t2i.config.process import DiffusionConfig, SamplerConfig, check_sampler
from dico_t2i.config.training import (
    CheckpointConfig,
    GuardConfig,
    LogConfig,
    OptimizerConfig,
    PreviewConfig,
    TrainConfig,
    ValidationConfig,
)
from dico_t2i.config.yaml12 import Text


class Config(Section):
    """A whole run."""

    name: Annotated[Text, Field(pattern=r"^\w[\w.+= -]*$", max_length=200)]  # of the run's folder
    seed: Seed = 0
    model: ModelConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    alignment: AlignmentConfig | None = None  # none: the diffusion loss alone
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()
    preview: PreviewConfig = PreviewConfig()
    validation: ValidationConfig | None = None
    sampler: SamplerConfig = SamplerConfig()  # the default of `dico sample` and of evaluations
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        train, data = self.train, self.data
        if train.global_batch % data.streams:
            raise ValueError(f"data.streams: {data.streams} does not divide train.global_batch: {train.global_batch}")
        unit = self.model.latent_divisor * self.downscale
        if data.image_size % unit:
            raise ValueError(
                f"data.image_size: {data.image_size} must be divisible by {unit} (latents of"
                f" {self.latent_size}x{self.latent_size} by {self.model.latent_divisor})"
            )
        channels = 3 if self.autoencoder.kind == "pixels" else self.model.in_channels
        if channels != self.model.in_channels:
            raise ValueError("model.in_channels: must be 3 with autoencoder.kind: pixels")
        if self.model.condition == "class" and self.preview.prompts:
            raise ValueError("preview.prompts: a class-conditional model takes preview.labels")
        if self.model.condition == "text" and self.preview.labels:
            raise ValueError("preview.labels: a text-conditional model takes preview.prompts")
        if max(self.preview.labels, default=0) >= self.model.num_classes:
            highest = self.model.num_classes - 1
            raise ValueError(f"preview.labels: {max(self.preview.labels)}, but model.num_classes ends at {highest}")
        if self.validation and _place(self.validation.path) in map(_place, data.paths):
            raise ValueError(
                f"validation.path: {self.validation.path} is what the run trains on; hold out other samples"
            )
        if self.validation and self.validation.bands > min(self.diffusion.steps, self.validation.samples):
            raise ValueError(f"validation.bands: {self.validation.bands} bands need as many samples and timesteps")
        return self

    @model_validator(mode="after")
    def _spans_without_minutes(self) -> Config:
        spans = {
            "train.duration": self.train.duration,
            "optimizer.warmup": self.optimizer.warmup,
            "log.every": self.log.every,
            "preview.every": self.preview.every,
            "validation.every": self.validation and self.validation.every,
            "checkpoint.keep_every": self.checkpoint.keep_every,
        }
        for key, span in spans.items():
            if span and span.minutes is not None:
                raise ValueError(f"{key}: give steps, images or epochs; minutes are for checkpoint.every alone")
        return self

    @model_validator(mode="after")
    def _alignment_sees_squares(self) -> Config:
        if self.alignment and self.data.buckets:
            raise ValueError("alignment: its encoder takes squares; leave data.buckets out, or alignment")
        return self

    @model_validator(mode="after")
    def _samplers_of_the_process(self) -> Config:
        if self.diffusion.kind == "flow" and self.model.learn_sigma:
            raise ValueError("model.learn_sigma: must be false with diffusion.kind: flow, which has no variance")
        check_sampler(self.diffusion, self.sampler)
        check_sampler(self.diffusion, self.preview.sampler, "preview.sampler")
        if self.model.condition == "class" and not self.model.dropout_prob:
            previews = self.preview.every is not None and self.preview.sampler.guidance != 1
            if previews or self.sampler.guidance != 1:
                raise ValueError(
                    f"{'preview.' if previews else ''}sampler.guidance: must be 1 with model.dropout_prob: 0, which"
                    " leaves no class to guide away from"
                )
        return self

    @model_validator(mode="after")
    def _positions(self) -> Config:
        model = self.model
        if isinstance(model, SizedConfig) and model.latent_size != self.latent_size:
            raise ValueError(
                f"model.latent_size: {model.latent_size}, but latents of data.image_size: {self.data.image_size} are"
                f" {self.latent_size}x{self.latent_size}; set model.latent_size={self.latent_size}"
            )
        if isinstance(model, UViTConfig) and self.data.buckets:
            raise ValueError("data.buckets: kind: uvit has learned positions for squares of one size; leave it out")
        return self

    @property
    def downscale(self) -> int:
        """Image pixels to one of what the network sees, in height and in width."""
        return 1 if self.autoencoder.kind == "pixels" else 8

    @property
    def latent_size(self) -> int:
        """Height and width of what the network sees."""
        return self.data.image_size // self.downscale

    def batching(self, ranks: int) -> tuple[int, int]:
        """Samples per rank and pass, and passes per step, on this many ranks.

        The largest micro-batch up to train.micro_batch that comes out even. Raises ConfigError when the ranks do not
        divide the streams.
        """
        streams = self.data.streams
        if streams % ranks:
            raise ConfigError(
                f"data.streams: {streams} is not divisible by the {ranks} ranks; use a number of ranks that divides it"
            )
        per_rank = self.train.global_batch // ranks
        micro = max(m for m in range(1, min(per_rank, self.train.micro_batch) + 1) if per_rank % m == 0)
        return micro, per_rank // micro


def _place(path: str) -> str:
    """What two spellings of one folder have in common."""
    return path.rstrip("/") if "://" in path else os.path.realpath(path)
