"""The whole config of a run, and the checks that look at several of its sections at once."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from dico_t2i.config.adapter import AdapterConfig
from dico_t2i.config.base import ConfigError, Section, Seed
from dico_t2i.config.cluster import ClusterConfig
from dico_t2i.config.data import DataConfig
from dico_t2i.config.encoders import AlignmentConfig, AutoencoderConfig, TextEncoderConfig
from dico_t2i.config.errors import explain
from dico_t2i.config.merge import merged
from dico_t2i.config.networks import DiCoConfig, ModelConfig, SizedConfig
from dico_t2i.config.process import DiffusionConfig, SamplerConfig, check_sampler
from dico_t2i.config.training import (
    CheckpointConfig,
    GuardConfig,
    InitConfig,
    LogConfig,
    OptimizerConfig,
    PreviewConfig,
    StageConfig,
    TrainConfig,
    ValidationConfig,
)
from dico_t2i.config.yaml12 import Text


class Config(Section):
    """The config of a whole run."""

    # The name of the run and of its folder.
    name: Annotated[Text, Field(pattern=r"^\w[\w.+= -]*$", max_length=200)]
    seed: Seed = 0  # The seed of all random draws: initial weights, data order, noise, timesteps, samples.
    model: ModelConfig  # The network.
    # The weights that the run starts from; with none they are random. A checkpoint of the run itself comes first.
    init: InitConfig | None = None
    diffusion: DiffusionConfig = DiffusionConfig()  # The diffusion process and its loss.
    autoencoder: AutoencoderConfig = AutoencoderConfig()  # The autoencoder.
    text_encoder: TextEncoderConfig = TextEncoderConfig()  # The text encoder, for a model with condition: text.
    # Alignment of features with an image encoder (REPA); with none the run trains on the diffusion loss alone.
    alignment: AlignmentConfig | None = None
    data: DataConfig  # The training data.
    # A low-rank adapter of the weights of init, which stay as they are; with none all weights are trained.
    adapter: AdapterConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()  # The optimizer, the learning rate and the averages of the weights.
    train: TrainConfig  # Duration, batch size, precision and other settings of the training loop.
    checkpoint: CheckpointConfig = CheckpointConfig()  # When checkpoints are written, and which are kept.
    guard: GuardConfig = GuardConfig()  # Protection against bad steps.
    log: LogConfig = LogConfig()  # Where the numbers of a run go, and how often.
    preview: PreviewConfig = PreviewConfig()  # Sample grids during training.
    validation: ValidationConfig | None = None  # The loss on held-out data; with none it is not measured.
    sampler: SamplerConfig = SamplerConfig()  # The default sampler of `dico sample` and of evaluations.
    cluster: ClusterConfig = ClusterConfig()  # The cluster that the run is launched on and planned for.
    # The stages of the run, one after the other, each with changes of this config; with none the run has one stage.
    stages: tuple[StageConfig, ...] = ()

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
            raise ValueError("model.in_channels: it must be 3 with autoencoder.kind: pixels")
        if self.model.condition == "class" and self.preview.prompts:
            raise ValueError("preview.prompts: a class-conditional model takes preview.labels")
        if self.model.condition == "text" and self.preview.labels:
            raise ValueError("preview.labels: a text-conditional model takes preview.prompts")
        highest = max(0, self.model.num_classes - 1)
        if max(self.preview.labels, default=0) > highest:
            raise ValueError(
                f"preview.labels: {max(self.preview.labels)}, but the highest class is {highest} (model.num_classes)"
            )
        if self.validation and _place(self.validation.path) in map(_place, data.paths):
            raise ValueError(
                f"validation.path: the run trains on {self.validation.path}; give a folder of held-out samples"
            )
        if self.validation and self.validation.bands > min(self.diffusion.steps, self.validation.samples):
            raise ValueError(
                f"validation.bands: {self.validation.bands} bands need at least as many samples and timesteps"
            )
        return self

    @model_validator(mode="after")
    def _spans_without_minutes(self) -> Config:
        spans = {
            "train.duration": self.train.duration,
            "optimizer.warmup": self.optimizer.warmup,
            "optimizer.decay": self.optimizer.decay,
            "log.every": self.log.every,
            "preview.every": self.preview.every,
            "validation.every": self.validation and self.validation.every,
            "checkpoint.keep_every": self.checkpoint.keep_every,
        }
        for key, span in spans.items():
            if span and span.minutes is not None:
                raise ValueError(f"{key}: give steps, images or epochs; only checkpoint.every takes minutes")
        return self

    @model_validator(mode="after")
    def _alignment_sees_squares(self) -> Config:
        if self.alignment and self.data.buckets:
            raise ValueError("alignment: its image encoder takes squares only; leave out data.buckets or alignment")
        return self

    @model_validator(mode="after")
    def _muon_has_whole_matrices(self) -> Config:
        if self.optimizer.kind == "muon" and self.train.zero_stage == 3:
            raise ValueError(
                "optimizer.kind: muon needs whole matrices, which zero_stage: 3 divides; use a stage from 0 to 2"
            )
        return self

    @model_validator(mode="after")
    def _adapter_has_a_base(self) -> Config:
        if self.adapter is None:
            return self
        if not isinstance(self.model, DiCoConfig):
            raise ValueError(f"adapter: it is for kind: dico, not for kind: {self.model.kind}; leave it out")
        if self.init is None or self.init.ignore:
            raise ValueError("adapter: it is added to all weights of a network; name it in init.from, without ignore")
        if self.alignment:
            raise ValueError("adapter: alignment would train a projector beside it; leave one of the two out")
        return self

    @model_validator(mode="after")
    def _samplers_of_the_process(self) -> Config:
        if self.diffusion.kind == "flow" and self.model.learn_sigma:
            raise ValueError(
                "model.learn_sigma: it must be false with diffusion.kind: flow, which has no variance to learn"
            )
        check_sampler(self.diffusion, self.sampler)
        check_sampler(self.diffusion, self.preview.sampler, "preview.sampler")
        if self.model.condition == "class" and not (self.model.dropout_prob and self.model.num_classes):
            previews = self.preview.every is not None and self.preview.sampler.guidance != 1
            if previews or self.sampler.guidance != 1:
                raise ValueError(
                    f"{'preview.' if previews else ''}sampler.guidance: it must be 1 with"
                    f" model.{'dropout_prob' if self.model.num_classes else 'num_classes'}: 0,"
                    " which trains no null class for guidance"
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
        if isinstance(model, SizedConfig) and model.learned_positions and self.data.buckets:
            raise ValueError(
                f"data.buckets: kind: {model.kind} learns positions for squares of one size; leave buckets out"
            )
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> Config:
        names = [stage.name for stage in self.stages]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"stages: two stages have the name {twice}; give them different names")
        for name, config in zip(names, self.stage_configs, strict=False):
            model = config.model
            if model.condition == "class" and bool(model.dropout_prob) != bool(self.model.dropout_prob):
                raise ValueError(f"stages.{name}.model.dropout_prob: a null class cannot come or go between stages")
            learned = isinstance(model, SizedConfig) and model.learned_positions
            if learned and config.latent_size != self.latent_size:
                raise ValueError(
                    f"stages.{name}.data.image_size: kind: {model.kind} learns positions for squares of one size; keep"
                    f" {self.data.image_size}"
                )
        return self

    @property
    def stage_configs(self) -> tuple[Config, ...]:
        """Return the config of each stage; of a run without stages, this config alone.

        Raises ValueError that names the stage whose changes do not make a valid config.
        """
        return tuple(map(self._at, self.stages)) or (self,)

    def _at(self, stage: StageConfig) -> Config:
        tree = self.model_dump(mode="json", exclude_none=True, exclude={"stages"})
        try:
            return Config.model_validate(merged(tree, stage.changes))
        except ValidationError as error:
            raise ValueError(f"stages.{stage.name}:\n{explain(error, Config)}") from None

    @property
    def downscale(self) -> int:
        """Return how many image pixels, in height and in width, correspond to one pixel of the network's input."""
        return 1 if self.autoencoder.kind == "pixels" else 8

    @property
    def latent_size(self) -> int:
        """Return the height and width of the network's input."""
        return self.data.image_size // self.downscale

    def batching(self, ranks: int) -> tuple[int, int]:
        """Return the samples per rank and pass (the micro-batch), and the passes per step, for this number of ranks.

        The micro-batch is the largest one up to train.micro_batch that divides the samples of a rank. Raises
        ConfigError when the number of ranks does not divide the number of streams, or train.zero_group not the ranks.
        """
        streams, group = self.data.streams, self.train.zero_group
        if streams % ranks:
            raise ConfigError(
                f"data.streams: {streams} is not divisible by the {ranks} ranks; use a number of ranks that divides it"
            )
        if group and ranks % group:
            raise ConfigError(
                f"train.zero_group: {group} does not divide the {ranks} ranks; use the number of ranks of a node"
            )
        per_rank = self.train.global_batch // ranks
        micro = max(m for m in range(1, min(per_rank, self.train.micro_batch) + 1) if per_rank % m == 0)
        return micro, per_rank // micro


def _place(path: str) -> str:
    """Return the same string for different spellings of one folder."""
    return path.rstrip("/") if "://" in path else os.path.realpath(path)
