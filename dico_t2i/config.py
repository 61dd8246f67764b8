"""The typed config tree: YAML files with ``extends:``, dotted overrides, and errors that name the key.

One object, ``Config``, describes a run. It is checked as a whole before anything else starts, and saved,
resolved, as ``config.yaml`` in the run folder. Lowest layer: imports nothing of the package.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

Positive = Annotated[StrictInt, Field(gt=0)]
NonNegative = Annotated[StrictInt, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Stage = Literal["encoder1", "encoder2", "middle", "decoder2", "decoder1"]

# The released sizes (paper, Table 11). `variant: DiCo-XL` in a config stands for these three values.
VARIANTS: dict[str, dict[str, Any]] = {
    "DiCo-S": {"hidden_size": 128, "depths": (5, 4, 4, 4, 4), "mlp_ratio": 2.0},
    "DiCo-B": {"hidden_size": 256, "depths": (5, 4, 4, 4, 4), "mlp_ratio": 2.0},
    "DiCo-L": {"hidden_size": 352, "depths": (9, 8, 9, 8, 9), "mlp_ratio": 2.0},
    "DiCo-XL": {"hidden_size": 416, "depths": (9, 9, 10, 9, 9), "mlp_ratio": 2.0},
    "DiCo-H": {"hidden_size": 416, "depths": (14, 12, 10, 12, 14), "mlp_ratio": 4.0},
}
# Peers, by their own papers: DiT (arXiv 2212.09748, table 1), U-ViT (2209.12152, table 7), PixArt-alpha (2310.00426) at
# DiT's sizes.
DIT_VARIANTS: dict[str, dict[str, Any]] = {
    "DiT-S/2": {"hidden_size": 384, "depth": 12, "num_heads": 6, "patch_size": 2},
    "DiT-B/2": {"hidden_size": 768, "depth": 12, "num_heads": 12, "patch_size": 2},
    "DiT-L/2": {"hidden_size": 1024, "depth": 24, "num_heads": 16, "patch_size": 2},
    "DiT-XL/2": {"hidden_size": 1152, "depth": 28, "num_heads": 16, "patch_size": 2},
}
UVIT_VARIANTS: dict[str, dict[str, Any]] = {
    "U-ViT-S/2": {"hidden_size": 512, "depth": 13, "num_heads": 8, "patch_size": 2},
    "U-ViT-S/2 deep": {"hidden_size": 512, "depth": 17, "num_heads": 8, "patch_size": 2},
}
PIXART_VARIANTS = {name.replace("DiT", "PixArt"): sizes for name, sizes in DIT_VARIANTS.items()}


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key and what to change."""


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key or a number that is not finite is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


AnySection = TypeVar("AnySection", bound=Section)


class Span(Section):
    """A duration or an interval, in exactly one unit."""

    steps: Positive | None = None
    images: Positive | None = None
    epochs: PositiveFloat | None = None
    minutes: PositiveFloat | None = None

    @model_validator(mode="after")
    def _one_unit(self) -> Span:
        if sum(v is not None for v in (self.steps, self.images, self.epochs, self.minutes)) != 1:
            raise ValueError("give exactly one of steps, images, epochs, minutes")
        return self

    def in_steps(self, batch: int, samples_per_epoch: int) -> int | None:
        """The span in optimizer steps, at least 1; None if it is given in minutes."""
        if self.minutes is not None:
            return None
        if self.steps is not None:
            return self.steps
        images = self.images if self.images is not None else (self.epochs or 0) * samples_per_epoch
        return max(1, round(images / batch))


class NetworkConfig(Section):
    """What all networks share: their channels, and what they are conditioned on."""

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # sizes with a name, for `variant:` in a config
    stages: ClassVar[tuple[str, ...]] = ()  # of checkpoint_stages, most activations first

    kind: str
    in_channels: Positive = 4
    learn_sigma: StrictBool = True
    condition: Literal["class", "text"] = "class"
    num_classes: Positive = 1000
    dropout_prob: Probability = 0.1  # of the condition, for guidance; 0 also drops the null class's row
    text_dim: Positive = 768  # of several encoders, that of the widest: the others are padded with zeros
    text_tokens: Positive = 77  # of all encoders together
    pooled_text: StrictBool = False  # add a projection of the pooled text to the timestep embedding
    pooled_dim: Positive = 768
    checkpoint_stages: tuple[str, ...] = ()  # stages that recompute activations in the backward pass

    @model_validator(mode="before")
    @classmethod
    def _expand_variant(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or "variant" not in data:
            return data
        data = dict(data)
        variant = data.pop("variant")
        if variant not in cls.variants:
            known = ", ".join(cls.variants) or "none: give hidden_size and the others"
            raise ValueError(f"variant: {variant!r} is not among those of this kind ({known})")
        clash = sorted(set(data) & set(cls.variants[variant]))
        if clash:
            raise ValueError(f"variant: {variant} already sets {', '.join(clash)}; give one or the other")
        return {**cls.variants[variant], **data}

    @model_validator(mode="after")
    def _pooled_is_of_text(self) -> NetworkConfig:
        if self.pooled_text and self.condition == "class":
            raise ValueError("pooled_text: is for condition: text; leave it out")
        return self

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def latent_divisor(self) -> int:
        """What height and width of the network's input must be divisible by."""
        return 1


class DiCoConfig(NetworkConfig):
    """DiCo (paper, section 3)."""

    variants = VARIANTS
    stages = ("decoder1", "encoder1", "decoder2", "encoder2", "middle")

    kind: Literal["dico"] = "dico"
    hidden_size: Positive
    depths: tuple[NonNegative, NonNegative, NonNegative, NonNegative, NonNegative]
    mlp_ratio: PositiveFloat
    text_fusion: Literal["dwc", "cross_attention"] = "dwc"
    text_projection: Literal["block", "stage"] = "block"  # one MLP in each block, or one for each stage
    # Tokens and width of each of several encoders: [[77, 768], [256, 1024]]. Each gets a layer to one common width.
    text_inputs: tuple[tuple[Positive, Positive], ...] = ()
    text_inputs_width: Positive | None = None  # that width; none: text_dim
    text_mask: StrictBool = False  # tokens of zeros are padding (T5's): attention leaves them out
    text_kernel: Literal[5, 7, 9, 11] = 9  # side of dwc's kernels; the last token repeats where tokens are fewer
    text_pooling: Literal["none", "attention"] = "none"  # dwc: learned pooling of the tokens to the kernels' taps
    # The switches of the paper's ablations (section 6; docs/networks.md). isotropic: patches of 2x2, one width for all.
    layout: Literal["u", "isotropic", "isotropic_skips"] = "u"
    mixer: Literal["conv", "attention", "window", "focused_linear", "agent"] = "conv"  # in the ConvModule's place
    channel_attention: Literal["compact", "se", "self", "none"] = "compact"  # in the ConvModule; compact is CCA
    depthwise_kernel: Literal[3, 5, 7] = 3  # in the ConvModule
    activation: Literal["gelu", "relu"] = "gelu"  # in the ConvModule and the feed-forward
    checkpoint_stages: tuple[Stage, ...] = ()  # stages that recompute activations in the backward pass

    @model_validator(mode="after")
    def _widths(self) -> DiCoConfig:
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size: {self.hidden_size} must be even (down-sampling halves it)")
        return self

    @model_validator(mode="after")
    def _text(self) -> DiCoConfig:
        side, pooled, dwc = self.text_kernel, self.text_pooling != "none", self.text_fusion == "dwc"
        if self.condition == "text" and dwc and not pooled and self.text_tokens > side**2:
            raise ValueError(
                f"text_tokens: {self.text_tokens} tokens do not fit a {side}x{side} kernel; at most {side**2} with"
                " text_fusion: dwc, or any number with text_pooling: attention"
            )
        if not dwc:
            self._refuse_keys_of_dwc()
        if self.text_mask and dwc and not pooled and not self.text_inputs:
            raise ValueError("text_mask: has no effect on kernels made of the tokens as they are; leave it out")
        if self.text_inputs_width and not self.text_inputs:
            raise ValueError("text_inputs_width: is for several encoders; give text_inputs, or leave it out")
        sums = {"text_tokens": sum(count for count, _ in self.text_inputs)}
        sums["text_dim"] = max((dim for _, dim in self.text_inputs), default=0)
        for key, size in sums.items():
            if self.text_inputs and getattr(self, key) != size:
                raise ValueError(f"{key}: {getattr(self, key)}, but text_inputs make {size}; set {key}: {size}")
        return self

    def _refuse_keys_of_dwc(self) -> None:
        for key in ("text_pooling", "text_kernel", "text_projection"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key}: is for text_fusion: dwc; cross_attention takes any number of tokens, and has keys and"
                    " values in each block"
                )

    @model_validator(mode="after")
    def _switches_of_the_conv_module(self) -> DiCoConfig:
        lost = sorted({"channel_attention", "depthwise_kernel"} & ablated(self).keys())
        if self.mixer != "conv" and lost:
            raise ValueError(f"{lost[0]}: is a part of mixer: conv; leave it out with mixer: {self.mixer}")
        return self

    @property
    def text_width(self) -> int:
        """Of the tokens that the blocks get."""
        return self.text_inputs_width or self.text_dim

    @property
    def latent_divisor(self) -> int:
        """Down-sampled twice."""
        return 4


def ablated(network: DiCoConfig) -> dict[str, Any]:
    """The switches of the paper's ablations that are not as in DiCo; none for the network of the paper."""
    switches = ("layout", "mixer", "channel_attention", "depthwise_kernel", "activation")
    values = {key: getattr(network, key) for key in switches}
    return {key: value for key, value in values.items() if value != DiCoConfig.model_fields[key].default}


class TransformerConfig(NetworkConfig):
    """What the peers share: transformers over patches."""

    stages = ("blocks",)

    hidden_size: Positive
    depth: Positive  # blocks
    num_heads: Positive
    patch_size: Positive = 2
    checkpoint_stages: tuple[Literal["blocks"], ...] = ()  # [blocks]: recompute activations in the backward pass

    @model_validator(mode="after")
    def _heads(self) -> TransformerConfig:
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size: {self.hidden_size} must be divisible by num_heads: {self.num_heads} and by 4"
            )
        return self

    @property
    def latent_divisor(self) -> int:
        return self.patch_size


class DiTConfig(TransformerConfig):
    """DiT of classes (Peebles and Xie 2023)."""

    variants = DIT_VARIANTS

    kind: Literal["dit"] = "dit"
    condition: Literal["class"] = "class"
    pooled_text: Literal[False] = False
    mlp_ratio: PositiveFloat = 4.0


class SizedConfig(TransformerConfig):
    """A transformer whose positions are made for one size."""

    latent_size: Positive = 32  # height and width of the network's input


class UViTConfig(SizedConfig):
    """U-ViT with text tokens in the sequence (Bao et al. 2023)."""

    variants = UVIT_VARIANTS

    kind: Literal["uvit"] = "uvit"
    condition: Literal["text"] = "text"
    pooled_text: Literal[False] = False
    mlp_ratio: PositiveFloat = 4.0

    @model_validator(mode="after")
    def _a_middle(self) -> UViTConfig:
        if self.depth % 2 == 0:
            raise ValueError(f"depth: {self.depth} must be odd: as many blocks before the middle one as after it")
        return self


class PixArtConfig(SizedConfig):
    """PixArt-alpha: DiT with cross-attention to the text (Chen et al. 2023), as diffusers has it."""

    variants = PIXART_VARIANTS

    kind: Literal["pixart"] = "pixart"
    condition: Literal["text"] = "text"
    pooled_text: Literal[False] = False
    text_mask: StrictBool = False  # tokens of zeros are padding (T5's): attention leaves them out


class MMDiTConfig(SizedConfig):
    """MMDiT: text and image attend to each other (Esser et al. 2024), as diffusers has it in Stable Diffusion 3."""

    kind: Literal["mmdit"] = "mmdit"
    condition: Literal["text"] = "text"
    pooled_text: Literal[True] = True


def _kind(model: Any) -> str:
    """Which network a section is of; DiCo without ``kind``."""
    return str(model.get("kind", "dico")) if isinstance(model, Mapping) else getattr(model, "kind", "dico")


ModelConfig = Annotated[
    Annotated[DiCoConfig, Tag("dico")]
    | Annotated[DiTConfig, Tag("dit")]
    | Annotated[UViTConfig, Tag("uvit")]
    | Annotated[PixArtConfig, Tag("pixart")]
    | Annotated[MMDiTConfig, Tag("mmdit")],
    Discriminator(_kind),
]


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


class AutoencoderConfig(Section):
    """The frozen map between images and latents."""

    kind: Literal["kl", "tiny", "pixels"] = "kl"
    path: str = "stabilityai/sd-vae-ft-ema"  # a local folder or a hub id
    scale: PositiveFloat = 0.18215  # latents times this are what the network sees; 1 for tiny and pixels

    @model_validator(mode="before")
    @classmethod
    def _scale_of_kind(cls, data: Any) -> Any:
        """Only Stable Diffusion's autoencoders have latents that are not of unit size."""
        if isinstance(data, Mapping) and data.get("kind", "kl") != "kl" and "scale" not in data:
            return {**data, "scale": 1.0}
        return data


class SeededTower(Section):
    """Size of a randomly initialised encoder."""

    width: Positive = 128
    layers: Positive = 2
    heads: Positive = 4
    seed: NonNegative = 0


class TextTowerConfig(Section):
    """One of several frozen text encoders."""

    kind: Literal["open_clip", "transformers", "t5"] = "transformers"  # the first two are CLIP's, by library
    # t5 and transformers: a local folder or a hub id; open_clip: an architecture such as ViT-L-14.
    model: str = "openai/clip-vit-large-patch14"
    # pretrained, or seeded: random frozen weights, for machines without any.
    weights: Literal["pretrained", "seeded"] = "pretrained"
    pretrained: str = "openai"  # open_clip only: a tag it knows, or a file of weights
    tokens: Positive = 77  # to which captions are cut or padded; t5 alone takes other numbers than 77
    seeded: SeededTower = SeededTower()

    @model_validator(mode="after")
    def _positions(self) -> TextTowerConfig:
        if self.kind != "t5" and self.tokens != 77:
            raise ValueError(f"tokens: {self.tokens}, but CLIP has 77; leave it out")
        return self


class TextEncoderConfig(TextTowerConfig):
    """The frozen text encoder."""

    also: tuple[TextTowerConfig, ...] = ()  # further ones, whose tokens follow the first one's in the sequence

    @property
    def towers(self) -> tuple[TextTowerConfig, ...]:
        return (self, *self.also)


class VisionEncoderConfig(Section):
    """A frozen image encoder, of which the features of patches are used."""

    kind: Literal["transformers", "timm"] = "transformers"
    model: str = "facebook/dinov2-base"  # a local folder or a hub id
    # pretrained, or seeded: random frozen weights, for machines without any.
    weights: Literal["pretrained", "seeded"] = "pretrained"
    image_size: Positive = 224  # pixels, square, that images are resized to; REPA: 224 for 256, 448 for 512
    seeded: SeededTower = SeededTower()  # of patches of 14x14 pixels


class AlignmentConfig(Section):
    """REPA (Yu et al. 2024): features of a block of the network are drawn to those of an image encoder."""

    block: StrictStr  # its path in the network: stages.middle.4 is the fifth of DiCo's middle stage
    encoder: VisionEncoderConfig = VisionEncoderConfig()
    weight: PositiveFloat = 0.5  # of the mean negative cosine similarity, in the loss
    hidden: Positive = 2048  # width of the projector, an MLP of three layers that trains with the network


class SourceConfig(Section):
    """One of the data sets of a mixture."""

    path: str
    name: Annotated[StrictStr, Field(pattern=r"^[\w.-]+$")]  # in metrics and messages
    weight: PositiveFloat = 1.0  # its share of the samples is this over the sum of all, exactly


class CacheConfig(Section):
    """Local copies of the shards that are read, the least recently used ones deleted first; shared by a node."""

    path: str
    max_gb: PositiveFloat  # of 1e9 bytes


class DataConfig(Section):
    """Shards to train on, and the order of their samples."""

    path: str | None = None  # a folder, or a URL that fsspec reads: http://..., s3://...
    mixture: tuple[SourceConfig, ...] = ()  # instead of path
    cache: CacheConfig | None = None  # needed for URLs; useful for slow network folders
    buckets: StrictBool = False  # batches of the shapes that the index gives, instead of squares
    cached_text: StrictBool = False  # text features stored with the samples, instead of encoding captions
    image_size: Positive = 256  # pixels; of images and of the images behind latents
    crop: Literal["center", "resize"] = "center"  # raw images: centre crop, or squeeze to a square
    flip: StrictBool = True
    streams: Positive = 64  # fixed for a run: any number of ranks dividing it sees the same batches
    shuffle_block: Positive = 1024  # samples of a stream shuffled together
    workers: NonNegative = 4  # reader processes per rank
    max_bad_samples: NonNegative = 1000  # replaced samples after which the run stops
    retries: NonNegative = 5  # of a read that the file system refuses; the waits double, from retry_wait_s
    retry_wait_s: NonNegativeFloat = 0.5

    @property
    def paths(self) -> tuple[str, ...]:
        """The folder or URL of each data set."""
        return tuple(source.path for source in self.mixture) or (self.path or "",)

    @model_validator(mode="after")
    def _one_origin(self) -> DataConfig:
        if bool(self.path) == bool(self.mixture):
            raise ValueError("path: give data.path, or data.mixture with several; one of the two")
        names = [source.name for source in self.mixture]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"mixture: the name {twice[0]} is given to two data sets; names must differ")
        if self.mixture and self.buckets:
            raise ValueError("mixture: cannot be used with data.buckets, whose batches come from one data set")
        remote = [path for path in self.paths if "://" in path and not path.startswith("file://")]
        if remote and self.cache is None:
            raise ValueError(
                f"cache: {remote[0]} is read through a local cache; set data.cache: {{path: ..., max_gb: ...}}"
            )
        return self


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
    keep_best: StrictBool = False  # nor the one with the lowest mean loss since the save before it
    background: StrictBool = True  # write while training goes on


class GuardConfig(Section):
    """What to do about steps that would spoil the weights."""

    spike: NonNegativeFloat = 0.0  # skip a gradient norm of more than so many times its running mean; 0: none
    max_skipped: Positive = 10  # skipped steps in a row after which the run goes back to its last checkpoint
    max_rollbacks: NonNegative = 1  # times it may do so; then it stops


class LogConfig(Section):
    every: Span = Span(steps=50)
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online with a key, else offline
    wandb_project: str = "dico_t2i"
    wandb_artifacts: StrictBool = False  # at the end, the manifest (not the weights) of the newest checkpoint
    tensorboard: StrictBool = False  # event files in the run folder; needs the package tensorboard


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


# The samplers of each diffusion.kind.
SAMPLERS = {"iddpm": ("iddpm", "ddim", "dpm++"), "flow": ("euler", "heun", "dpm++", "euler_sde")}


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


class PreviewConfig(Section):
    """Sample grids during training."""

    every: Span | None = None  # none: no grids
    prompts: tuple[str, ...] = ()
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
    path: str  # shards made like those of data.path, of other images
    samples: Positive = 2048  # at least so many: whole batches are taken
    bands: Positive = 8  # equal bands of timesteps, each seen at its middle


class HardwareConfig(Section):
    """What `dico plan` reckons with: one device, and the wires between them. Decimal units."""

    name: str = "H100"
    memory_gb: PositiveFloat = 80.0
    peak_tflops: PositiveFloat = 650.0  # of bf16 matrix products, as measured rather than as advertised
    memory_gb_s: PositiveFloat = 2900.0
    link_gb_s: PositiveFloat = 350.0  # of one device to others of its node, each way
    network_gb_s: PositiveFloat = 40.0  # of one device to other nodes, each way
    disk_gb_s: PositiveFloat = 1.0  # of one node to the file system of checkpoints


class ClusterConfig(Section):
    """Where a run is launched (cluster/launch.py) and planned for (`dico plan`); a profile file holds these keys."""

    nodes: Positive = 1
    gpus_per_node: NonNegative = 8  # 0: train on CPUs
    tasks_per_node: Positive | None = None  # none: one per GPU, or one on a node without
    cpus_per_task: Positive = 8
    mem: str | None = None  # of a node, as sbatch understands it: 400G; 0 is all
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str = "24:00:00"  # limit, as sbatch understands it: minutes, H:M:S or days-H:M:S
    exclusive: StrictBool = False
    sbatch: dict[str, StrictStr | StrictInt | StrictBool] = {}  # further options: {reservation: lab, mail-user: me}
    srun: tuple[str, ...] = ()  # further options of srun: [--mpi=none]
    cpu_bind: str | None = None  # of srun: cores, none, ...
    setup: tuple[str, ...] = ()  # lines of shell before anything else: module load, source ...
    env: dict[str, StrictStr | StrictInt] = {}  # of every rank: {NCCL_SOCKET_IFNAME: ib0}
    container: str | None = None  # an image for srun --container-image (pyxis)
    container_mounts: tuple[str, ...] = ()
    python: str | None = None  # on the nodes; none: the one that launches
    signal_lead_s: Positive | None = None  # before the time limit; none: from measured saves and steps
    max_requeues: NonNegative = 100
    hardware: HardwareConfig = HardwareConfig()

    @field_validator("time", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError(f'put it in quotes, "24:00:00" or "90" (minutes): YAML has made the number {value} of it')
        return value

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @model_validator(mode="after")
    def _one_process_per_gpu(self) -> ClusterConfig:
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"tasks_per_node: {self.tasks_per_node} with gpus_per_node: {self.gpus_per_node};"
                " there is one process per GPU, leave tasks_per_node out"
            )
        return self


class Config(Section):
    """A whole run."""

    name: Annotated[StrictStr, Field(pattern=r"^\w[\w.+= -]*$", max_length=200)]  # of the run's folder
    seed: NonNegative = 0
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


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, follow ``extends:``, apply ``key.path=value`` overrides, validate.

    Raises ConfigError with the file, the key's path and the remedy.
    """
    return load_section(Path(path), Config, overrides)


def read_cluster(profile: Path | None, changes: Mapping[str, Any], below: ClusterConfig | None = None) -> ClusterConfig:
    """A cluster from a profile file, under what ``below`` sets itself, under ``changes``.

    Raises ConfigError with the file and the key.
    """
    own = below.model_dump(include=below.model_fields_set) if below else {}
    tree = {**(_read_tree(profile, ()) if profile else {}), **own, **changes}
    return parse_section(tree, ClusterConfig, str(profile or "cluster"))


def load_section(path: Path, section: type[AnySection], overrides: Iterable[str] = ()) -> AnySection:
    """Any section from a file of its own, with ``extends:`` and overrides as ``load_config`` has them.

    Raises ConfigError with the file, the key's path and the remedy.
    """
    tree = _read_tree(path, ())
    for override in overrides:
        _apply_override(tree, override)
    return parse_section(tree, section, str(path))


def parse_section(tree: Mapping[str, Any], section: type[AnySection], source: str) -> AnySection:
    """Validate a plain tree as any section; ``source`` is named in errors."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}:\n{_explain(error, section)}") from None


def parse_config(tree: Mapping[str, Any], source: str) -> Config:
    """Validate a plain tree; ``source`` is named in errors."""
    return parse_section(tree, Config, source)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of sections, and of lists of sections, as {"key.path": value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
            value = {str(number): entry for number, entry in enumerate(value)}
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat


def dump_config(config: Config) -> str:
    """The resolved config as YAML that ``load_config`` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False)


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself, through {' -> '.join(map(str, seen))}")
    try:
        tree = _read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, not a config file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, found {type(tree).__name__}")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    return _merge(_read_tree(path.parent / str(base), (*seen, path.resolve())), tree)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key that is given twice is an error; YAML's own rule would drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, yaml.Node] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key != "<<" and key in seen:
                first = seen[key].start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is given twice, first in line {first}", key_node.start_mark
                )
            seen[str(key)] = key_node
        return super().construct_mapping(node, deep)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


# Keys that exclude each other: a file that extends another replaces a section of them as a whole.
_SPAN_KEYS = set(Span.model_fields)


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and not (_is_span(old) and _is_span(value)):
            value = _merge(old, value)
        merged[key] = value
    return merged


def _place(path: str) -> str:
    """What two spellings of one folder have in common."""
    return path.rstrip("/") if "://" in path else os.path.realpath(path)


def _is_span(section: Mapping[str, Any]) -> bool:
    return bool(section) and set(section) <= _SPAN_KEYS


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(f"override {override!r}: expected key.path=value")
    try:
        value = _read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {part} is a value, not a section")
        node = child
    if last in _SPAN_KEYS and _is_span(node):
        node.clear()
    node[last] = value


def _explain(error: ValidationError, root: type[Section] = Config) -> str:
    lines = []
    for item in error.errors():
        loc, section = _resolve(item["loc"], root)
        key = ".".join(str(part) for part in loc)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key" + _suggestion(str(loc[-1]), section)
        elif item["type"] == "union_tag_invalid":
            key, message = f"{key}.kind", f"{item['ctx']['tag']!r} is not one of {item['ctx']['expected_tags']}"
        elif item["type"] != "missing" and item["type"] != "value_error":
            message = f"{message}, found {item['input']!r}"
        lines.append(f"  {key}: {message}" if key else f"  {message}")
    return "\n".join(lines)


def _resolve(loc: tuple[int | str, ...], section: type[Section]) -> tuple[list[int | str], type[Section]]:
    """The keys of an error's place, without the kinds that stand among them, and the section of the last one."""
    keys: list[int | str] = []
    kinds: dict[str, type[Section]] = {}  # that the next part may name: of a choice by kind
    for number, part in enumerate(loc):
        if part in kinds:
            section, kinds = kinds[str(part)], {}
            continue
        keys.append(part)
        if isinstance(part, str) and part in section.model_fields and number + 1 < len(loc):
            options = _sections(section.model_fields[part].annotation)
            kinds = {
                o.model_fields["kind"].default: o for o in options if "kind" in o.model_fields and len(options) > 1
            }
            section = options[0] if options else section
    return keys, section


def _sections(annotation: Any) -> list[type[Section]]:
    """The sections in a field's type: one, one or None, several, or a list of one."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) else []
    return [section for part in getattr(annotation, "__args__", ()) for section in _sections(part)]


def _suggestion(key: str, section: type[Section]) -> str:
    """The known key nearest to an unknown one."""
    import difflib

    named = issubclass(section, NetworkConfig) and section.variants
    known = list(section.model_fields) + (["variant"] if named else [])
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}"
