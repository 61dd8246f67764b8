"""Config sections for training: optimizer, checkpoints, guard, logging, previews, validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, StrictInt, field_validator, model_serializer, model_validator

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


class InitConfig(Section):
    """The weights that a new run starts from. Its optimizer, step and data start afresh; see docs/training.md."""

    # A run, one of its checkpoints, an exported folder, or a file of weights (safetensors, or a released DiCo). The
    # last two may be at a hub id or a URL.
    from_: Text = Field(alias="from")
    # For a run or a checkpoint: raw, or an average such as ema_0.9999; with none it is the first average.
    weights: Text | None = None
    # Patterns of the parameters that may be missing, left over or of another shape, such as [stages.*.text.*]; those
    # of the network that are not loaded keep their initial values.
    ignore: tuple[Text, ...] = ()

    @model_serializer(mode="wrap")
    def _from(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key.rstrip("_"): value for key, value in dump(self).items()}


class OptimizerConfig(Section):
    """The optimizer, its learning rate, and the averages (EMA) of the weights."""

    # adamw; adamw_8bit, which keeps AdamW's moments in 8 bits and needs the package torchao; or muon, which updates the
    # matrices of linear layers by Muon and all other weights by AdamW.
    kind: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    lr: PositiveFloat = 1e-4  # The learning rate after the warmup.
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)  # The decays of AdamW's two moments.
    eps: PositiveFloat = 1e-8  # The epsilon in AdamW's denominator.
    momentum: BelowOne = 0.95  # The decay of Muon's momentum.
    weight_decay: NonNegativeFloat = 0.0  # The decoupled weight decay of all weights.
    # The largest gradient norm, to which larger ones are scaled down; 0 turns clipping off.
    clip: NonNegativeFloat = 0.0
    warmup: Span | None = None  # How long the learning rate rises linearly at the start; with none it starts at lr.
    # The learning rate after the warmup: constant, or a cosine down to 0 at the end of the run, or wsd (warmup, stable,
    # decay), which is constant and then falls linearly to 0.
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    decay: Span | None = None  # How long the learning rate falls at the end of the run, with schedule: wsd.
    # The decays per step of the averages of the weights; each gives a separate average.
    ema: tuple[Probability, ...] = (0.9999,)

    @field_validator("ema")
    @classmethod
    def _names_differ(cls, decays: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{decay:g}" for decay in decays}) < len(decays):
            raise ValueError("two decays have the same first six digits, which name the averages")
        return decays

    @model_validator(mode="after")
    def _decay_of_wsd(self) -> OptimizerConfig:
        if (self.schedule == "wsd") != (self.decay is not None):
            raise ValueError("decay: schedule: wsd needs it, and no other schedule has it")
        return self


class ProfileConfig(Section):
    """A torch.profiler trace of rank 0, written to profile/ in the run folder."""

    # The step before which the trace starts; choose a later one than the first few, which are slower than the rest.
    start: NonNegative
    steps: Positive = 3  # The number of steps in the trace.


class TrainConfig(Section):
    """The training loop."""

    duration: Span  # The length of the run, in steps, images or epochs.
    global_batch: Positive = 256  # The number of samples in an optimizer step, of all ranks together.
    # The largest number of samples in one pass of a rank; gradients are accumulated over the passes of a step.
    micro_batch: Positive = 32
    # The precision of the network's arithmetic; the optimizer always keeps fp32 weights.
    precision: Literal["bf16", "fp32"] = "bf16"
    # Lets a GPU round the factors of products and convolutions in fp32 to TF32, which is faster and less exact.
    tf32: Flag = False
    # The ZeRO stage of DeepSpeed: 1 divides the optimizer state among the ranks, 2 also the gradients, 3 also the
    # weights.
    zero_stage: Annotated[StrictInt, Field(ge=0, le=3)] = 1
    # At ZeRO stage 3, the number of neighbouring ranks, such as those of a node, that keep another copy of the weights
    # and divide it among themselves (DeepSpeed's hpZ). Then only the first gather of each step goes beyond them. With
    # none there is no such copy.
    zero_group: Positive | None = None
    compile: Literal["off", "blocks"] = "off"  # blocks compiles each kind of block once with torch.compile.
    # Seconds without progress of a rank after which the job ends and names that rank.
    hang_timeout_s: PositiveFloat = 600.0
    # The same for the first step; saves and previews get as much extra time.
    first_step_timeout_s: PositiveFloat = 1800.0
    profile: ProfileConfig | None = None  # A profiler trace of some steps; with none there is no trace.

    @model_validator(mode="after")
    def _weights_stay_in_compiled_blocks(self) -> TrainConfig:
        if self.compile != "off" and self.zero_stage == 3:
            raise ValueError(
                f"compile: {self.compile} does not work with zero_stage: 3, which gathers weights inside a block;"
                " use stage 1 or 2, or compile: off"
            )
        return self

    @model_validator(mode="after")
    def _groups_divide_weights(self) -> TrainConfig:
        if self.zero_group is not None and self.zero_stage != 3:
            raise ValueError(
                f"zero_group: {self.zero_group} with zero_stage: {self.zero_stage}; only stage 3 divides the weights,"
                " so leave zero_group out, or use zero_stage: 3"
            )
        return self


Changes = dict[str, Any]  # keys of a section of the config

_FREE_OF_MODEL = ("dropout_prob", "checkpoint_stages", "latent_size")


class StageConfig(Section):
    """A stage of a run, which trains on from the weights, moments and averages of the stage before it.

    Each section holds the keys that differ from those of the whole config; data: {image_size: 512}, for example.
    """

    name: Annotated[
        Text, Field(pattern=r"^[\w.+= -]+$", max_length=100)
    ]  # The name of the stage in messages and reports.
    # The changes of the model: dropout_prob, checkpoint_stages, latent_size. All else is the same in all stages.
    model: Changes = {}
    diffusion: Changes = {}  # The changes of the diffusion process.
    data: Changes = {}  # The changes of the data: other shards, another image_size, buckets.
    optimizer: Changes = {}  # The changes of the optimizer; warmup and schedule count the steps of the stage.
    train: Changes = {}  # The changes of the loop; its duration is that of the stage.
    checkpoint: Changes = {}  # The changes of the checkpoints.
    guard: Changes = {}  # The changes of the guard.
    preview: Changes = {}  # The changes of the sample grids.
    validation: Changes | None = {}  # The changes of the validation; null turns it off.
    sampler: Changes = {}  # The changes of the default sampler.

    @field_validator("model")
    @classmethod
    def _one_network(cls, changes: Changes) -> Changes:
        fixed = sorted(changes.keys() - set(_FREE_OF_MODEL))
        if fixed:
            free = ", ".join(_FREE_OF_MODEL)
            raise ValueError(f"{fixed[0]}: all stages train one network; a stage may only change {free}")
        return changes

    @field_validator("checkpoint")
    @classmethod
    def _one_copy(cls, changes: Changes) -> Changes:
        if "path" in changes:
            raise ValueError("path: all stages are one run with one copy; set checkpoint.path for the whole run")
        return changes

    @property
    def changes(self) -> Changes:
        """Return the changes of all sections."""
        return {key: getattr(self, key) for key in type(self).model_fields if key in self.model_fields_set - {"name"}}

    @model_serializer
    def _with_nulls(self) -> dict[str, Any]:
        """Keep null, which turns a key of the whole config off."""
        return {"name": self.name, **self.changes}


class CheckpointConfig(Section):
    """When checkpoints are written, and which are kept."""

    every: Span = Span(minutes=30)  # The interval between checkpoints.
    keep_last: Positive = 3  # How many of the newest checkpoints are kept.
    # The interval of further checkpoints that are never deleted; with none there are no others.
    keep_every: Span | None = None
    keep_best: Flag = False  # Keeps the checkpoint with the lowest mean loss since the save before it, too.
    background: Flag = True  # Writes checkpoints while training continues.
    # A URL that fsspec can write, such as s3://bucket/runs, or a folder on another disk. Each checkpoint is also copied
    # to a folder there with the name of the run, in the background. A run without its folder resumes from there.
    path: Text | None = None


class GuardConfig(Section):
    """Protection against steps that would damage the weights."""

    # Skips a step whose gradient norm exceeds this many times its running mean; 0 skips none for that reason.
    spike: NonNegativeFloat = 0.0
    # The number of skipped steps in a row after which the run returns to its last checkpoint.
    max_skipped: Positive = 10
    max_rollbacks: NonNegative = 1  # How many times a run may return to a checkpoint before it stops instead.


class LogConfig(Section):
    """Reports and trackers."""

    every: Span = Span(steps=50)  # The interval between reports of the loss and other numbers.
    # The mode of Weights & Biases; auto is online where there is an API key and offline elsewhere.
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    wandb_project: Text = "dico_t2i"  # The project in Weights & Biases.
    # Uploads the manifest of the newest checkpoint, without the weights, at the end of the run.
    wandb_artifacts: Flag = False
    tensorboard: Flag = False  # Writes event files into the run folder; this needs the package tensorboard.


class PreviewConfig(Section):
    """Sample grids during training."""

    every: Span | None = None  # The interval between sample grids; with none there are no grids.
    prompts: tuple[Text, ...] = ()  # The prompts to sample, for a model with condition: text.
    labels: tuple[NonNegative, ...] = ()  # The class labels to sample, for a model with condition: class.
    # The sampler of the grids; keys that are left out have the values shown here.
    sampler: SamplerConfig = SamplerConfig(kind="dpm++", steps=20, guidance=3.0)

    @field_validator("sampler", mode="before")
    @classmethod
    def _keys_left_out(cls, value: Any) -> Any:
        default = cls.model_fields["sampler"].default.model_dump(exclude_unset=True)
        return {**default, **value} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _something_to_sample(self) -> PreviewConfig:
        if self.every is not None and not self.prompts and not self.labels:
            raise ValueError("every: there is nothing to sample; give prompts or labels as well")
        return self


class ValidationConfig(Section):
    """The loss of the averaged weights on held-out data at fixed timesteps."""

    every: Span  # The interval between validations.
    path: Text  # The folder of shards of other images, made in the same way as those of data.path.
    samples: Positive = 2048  # The smallest number of samples; it is rounded up to whole batches.
    bands: Positive = 8  # The number of equal bands of timesteps, each of which is evaluated at its middle.
