"""Config sections for the networks: DiCo, the peers it is compared with, and their named sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Discriminator, Tag, model_validator

from dico_t2i.config.base import BelowOne, NonNegative, Positive, PositiveFloat, Probability, Section
from dico_t2i.config.yaml12 import Flag, Text

Stage = Literal["encoder1", "encoder2", "middle", "decoder2", "decoder1"]


# The released sizes (paper, table 11). `variant: DiCo-XL` in a config stands for these three values.
VARIANTS: dict[str, dict[str, Any]] = {
    "DiCo-S": {"hidden_size": 128, "depths": (5, 4, 4, 4, 4), "mlp_ratio": 2.0},
    "DiCo-B": {"hidden_size": 256, "depths": (5, 4, 4, 4, 4), "mlp_ratio": 2.0},
    "DiCo-L": {"hidden_size": 352, "depths": (9, 8, 9, 8, 9), "mlp_ratio": 2.0},
    "DiCo-XL": {"hidden_size": 416, "depths": (9, 9, 10, 9, 9), "mlp_ratio": 2.0},
    "DiCo-H": {"hidden_size": 416, "depths": (14, 12, 10, 12, 14), "mlp_ratio": 4.0},
}


# The peers' sizes come from their papers: DiT (arXiv 2212.09748, table 1), U-ViT (2209.12152, table 7). PixArt-alpha
# (2310.00426) has DiT's sizes.
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


# DiG (2405.18428), DiS (2402.05608) and DiM (2405.14224) have the sizes of their code.
DIG_VARIANTS: dict[str, dict[str, Any]] = {
    "DiG-S/2": {"hidden_size": 384, "depth": 12, "num_heads": 6, "patch_size": 2},
    "DiG-B/2": {"hidden_size": 768, "depth": 12, "num_heads": 12, "patch_size": 2},
    "DiG-L/2": {"hidden_size": 1024, "depth": 24, "num_heads": 16, "patch_size": 2},
    "DiG-XL/2": {"hidden_size": 1152, "depth": 28, "num_heads": 18, "patch_size": 2},
}


DIS_VARIANTS: dict[str, dict[str, Any]] = {
    f"DiS-{size}/{patch}": {"hidden_size": width, "depth": depth, "patch_size": patch}
    for size, width, depth in (("S", 368, 24), ("B", 768, 24), ("M", 768, 48), ("L", 1024, 48), ("H", 1536, 48))
    for patch in (2, 4)
}


DIM_VARIANTS: dict[str, dict[str, Any]] = {
    "DiM-S/2": {"hidden_size": 512, "depth": 25, "patch_size": 2},
    "DiM-L/2": {"hidden_size": 1024, "depth": 49, "patch_size": 2},
    "DiM-H/2": {"hidden_size": 1536, "depth": 49, "patch_size": 2},
}


PIXART_VARIANTS = {name.replace("DiT", "PixArt"): sizes for name, sizes in DIT_VARIANTS.items()}


class NetworkConfig(Section):
    """Keys that all networks share: their channels, and what they are conditioned on."""

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # the named sizes, for `variant:` in a config
    stages: ClassVar[tuple[str, ...]] = ()  # choices for checkpoint_stages, most activations first

    kind: Text  # The network.
    # The number of channels of the latents: 4 for Stable Diffusion's autoencoder, 3 for pixels.
    in_channels: Positive = 4
    # Predicts the variance of a denoising step as well (iDDPM), which doubles the output channels.
    learn_sigma: Flag = True
    condition: Literal["class", "text"] = "class"  # What the network is conditioned on: class labels or text.
    num_classes: Positive = 1000  # The number of classes, with condition: class.
    # The probability with which training drops the condition, for guidance; with 0 there is no null class.
    dropout_prob: Probability = 0.1
    # The width of the text tokens; with several encoders that of the widest, to which the others are padded with zeros.
    text_dim: Positive = 768
    text_tokens: Positive = 77  # The number of text tokens, of all encoders together.
    pooled_text: Flag = False  # Adds a projection of the pooled text to the timestep embedding.
    pooled_dim: Positive = 768  # The width of the pooled text.
    # The stages that recompute their activations in the backward pass to save memory.
    checkpoint_stages: tuple[Text, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _expand_variant(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or "variant" not in data:
            return data
        data = dict(data)
        variant = data.pop("variant")
        if variant is None:  # a size of its own, in a file that extends one with a variant
            return data
        if variant not in cls.variants:
            known = ", ".join(cls.variants) or "it has none: give hidden_size and the other sizes"
            raise ValueError(f"variant: {variant!r} is not a variant of this kind ({known})")
        clash = sorted(set(data) & set(cls.variants[variant]))
        if clash:
            raise ValueError(f"variant: {variant} already sets {', '.join(clash)}; give one or the other")
        return {**cls.variants[variant], **data}

    @model_validator(mode="after")
    def _pooled_is_of_text(self) -> NetworkConfig:
        if self.pooled_text and self.condition == "class":
            raise ValueError("pooled_text: it needs condition: text; leave it out")
        return self

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def latent_divisor(self) -> int:
        """Return the number that must divide the height and width of the network's input."""
        return 1


class DiCoConfig(NetworkConfig):
    """DiCo (paper, section 3)."""

    variants = VARIANTS
    stages = ("decoder1", "encoder1", "decoder2", "encoder2", "middle")

    kind: Literal["dico"] = "dico"  # Selects this network.
    hidden_size: Positive  # The number of channels at the highest resolution; each down-sampling doubles it.
    # The number of blocks of each stage: encoder1, encoder2, middle, decoder2, decoder1.
    depths: tuple[NonNegative, NonNegative, NonNegative, NonNegative, NonNegative]
    mlp_ratio: PositiveFloat  # The hidden width of the feed-forward, as a multiple of the block's channels.
    # How text enters a block: dwc is a depthwise convolution whose kernels are made from the tokens.
    text_fusion: Literal["dwc", "cross_attention"] = "dwc"
    # For dwc: where the MLP that makes the kernels is, in each block or once for each stage.
    text_projection: Literal["block", "stage"] = "block"
    # The number of convolutions along the text, by which each token learns about its neighbours.
    text_layers: NonNegative = 0
    # The number of learned queries that gather the words of a text; a summary of what they gather is added to the
    # timestep embedding. 0 is for no summary.
    text_summary: NonNegative = 0
    text_summary_width: Positive | None = None  # The width of the summary; with none it is that of the tokens.
    # Tokens and width of each of several encoders, such as [[77, 768], [256, 1024]]; a linear layer for each encoder
    # brings its tokens to one common width.
    text_inputs: tuple[tuple[Positive, Positive], ...] = ()
    text_inputs_width: Positive | None = None  # The common width of text_inputs; with none it is text_dim.
    text_mask: Flag = False  # Treats tokens of zeros as padding, as T5 needs: attention leaves them out.
    # Height and width of dwc's kernels; where there are fewer tokens than kernel taps, the last token is repeated.
    text_kernel: Literal[5, 7, 9, 11] = 9
    # For dwc: attention pools any number of tokens to the taps of the kernels with learned queries.
    text_pooling: Literal["none", "attention"] = "none"
    # The arrangement of the blocks: a U-shape, or one width and one resolution with patches of 2x2, without or with
    # long skips. This key and the next four are the switches of the paper's ablations (section 6; docs/networks.md).
    layout: Literal["u", "isotropic", "isotropic_skips"] = "u"
    # The spatial layer of a block: conv is the paper's ConvModule, the others are attentions in its place.
    mixer: Literal["conv", "attention", "window", "focused_linear", "agent"] = "conv"
    # The channel attention in the ConvModule; compact is the paper's CCA.
    channel_attention: Literal["compact", "se", "self", "none"] = "compact"
    depthwise_kernel: Literal[3, 5, 7] = 3  # Height and width of the depthwise convolution in the ConvModule.
    activation: Literal["gelu", "relu"] = "gelu"  # The activation in the ConvModule and in the feed-forward.
    # How the embedding of the timestep starts: small is the release's normal distribution of 0.02; xavier is several
    # times as large, and short runs learn faster with it.
    time_init: Literal["small", "xavier"] = "small"
    # The stages that recompute their activations in the backward pass to save memory.
    checkpoint_stages: tuple[Stage, ...] = ()

    @model_validator(mode="after")
    def _widths(self) -> DiCoConfig:
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size: {self.hidden_size} must be even, since down-sampling halves it")
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
        masks = pooled or self.text_inputs or self.text_layers or self.text_summary
        if self.text_mask and dwc and not masks:
            raise ValueError(
                "text_mask: it has no effect on kernels that are made directly from the tokens; leave it out"
            )
        if self.text_summary_width and not self.text_summary:
            raise ValueError("text_summary_width: it is for a summary; give text_summary, or leave it out")
        if self.text_inputs_width and not self.text_inputs:
            raise ValueError("text_inputs_width: it is for several encoders; give text_inputs, or leave it out")
        sums = {"text_tokens": sum(count for count, _ in self.text_inputs)}
        sums["text_dim"] = max((dim for _, dim in self.text_inputs), default=0)
        for key, size in sums.items():
            if self.text_inputs and getattr(self, key) != size:
                raise ValueError(f"{key}: {getattr(self, key)}, but text_inputs amount to {size}; set {key}: {size}")
        return self

    def _refuse_keys_of_dwc(self) -> None:
        for key in ("text_pooling", "text_kernel", "text_projection"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key}: it is for text_fusion: dwc; cross_attention takes any number of tokens and makes keys and"
                    " values in each block"
                )

    @model_validator(mode="after")
    def _switches_of_the_conv_module(self) -> DiCoConfig:
        lost = sorted({"channel_attention", "depthwise_kernel"} & ablated(self).keys())
        if self.mixer != "conv" and lost:
            raise ValueError(f"{lost[0]}: it belongs to mixer: conv; leave it out with mixer: {self.mixer}")
        return self

    @property
    def text_width(self) -> int:
        """Return the width of the tokens that the blocks receive."""
        return self.text_inputs_width or self.text_dim

    @property
    def summary_width(self) -> int:
        """Return the width of the text's summary."""
        return self.text_summary_width or self.text_width

    @property
    def latent_divisor(self) -> int:
        """Return 4, since the input is down-sampled twice."""
        return 4


def ablated(network: DiCoConfig) -> dict[str, Any]:
    """Return the ablation switches that differ from the paper's network; empty for that network."""
    switches = ("layout", "mixer", "channel_attention", "depthwise_kernel", "activation")
    values = {key: getattr(network, key) for key in switches}
    return {key: value for key, value in values.items() if value != DiCoConfig.model_fields[key].default}


class PatchConfig(NetworkConfig):
    """Keys that the peers share: all of them work on patches of the latents."""

    stages = ("blocks",)

    hidden_size: Positive  # The width of the tokens.
    depth: Positive  # The number of blocks.
    patch_size: Positive = 2  # Height and width of a patch of the latents.
    # [blocks] recomputes all activations in the backward pass to save memory.
    checkpoint_stages: tuple[Literal["blocks"], ...] = ()

    @property
    def latent_divisor(self) -> int:
        return self.patch_size


class TransformerConfig(PatchConfig):
    """Keys that the transformers share."""

    num_heads: Positive  # The number of attention heads.

    @model_validator(mode="after")
    def _heads(self) -> TransformerConfig:
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size: {self.hidden_size} must be divisible by num_heads: {self.num_heads} and by 4"
            )
        return self


class DiTConfig(TransformerConfig):
    """DiT with class labels (Peebles and Xie 2023)."""

    variants = DIT_VARIANTS

    kind: Literal["dit"] = "dit"  # Selects this network.
    condition: Literal["class"] = "class"  # DiT takes class labels only.
    pooled_text: Literal[False] = False  # DiT takes no text.
    mlp_ratio: PositiveFloat = 4.0  # The hidden width of the feed-forward, as a multiple of hidden_size.


class SizedConfig(PatchConfig):
    """A network whose position embedding is made for one input size."""

    learned_positions: ClassVar[bool] = False  # whether its tokens must be those of one size

    latent_size: Positive = 32  # Height and width of the network's input.


class SizedTransformerConfig(TransformerConfig, SizedConfig):
    """A transformer whose position embedding is made for one input size."""


class UViTConfig(SizedTransformerConfig):
    """U-ViT with text tokens, or one token for the class, in the sequence (Bao et al. 2023)."""

    variants = UVIT_VARIANTS
    learned_positions = True

    kind: Literal["uvit"] = "uvit"  # Selects this network.
    condition: Literal["class", "text"] = "text"  # What the network is conditioned on: class labels or text.
    pooled_text: Literal[False] = False  # U-ViT takes no pooled text.
    mlp_ratio: PositiveFloat = 4.0  # The hidden width of the feed-forward, as a multiple of hidden_size.

    @model_validator(mode="after")
    def _a_middle(self) -> UViTConfig:
        if self.depth % 2 == 0:
            raise ValueError(
                f"depth: {self.depth} must be odd: one middle block, with as many blocks before it as after it"
            )
        return self


class PixArtConfig(SizedTransformerConfig):
    """PixArt-alpha: DiT with cross-attention to the text (Chen et al. 2023), as implemented in diffusers."""

    variants = PIXART_VARIANTS

    kind: Literal["pixart"] = "pixart"  # Selects this network.
    condition: Literal["text"] = "text"  # PixArt takes text only.
    pooled_text: Literal[False] = False  # PixArt takes no pooled text.
    text_mask: Flag = False  # Treats tokens of zeros as padding, as T5 needs: attention leaves them out.


class MMDiTConfig(SizedTransformerConfig):
    """MMDiT: text and image attend to each other (Esser et al. 2024); diffusers' network of Stable Diffusion 3."""

    kind: Literal["mmdit"] = "mmdit"  # Selects this network.
    condition: Literal["text"] = "text"  # MMDiT takes text only.
    pooled_text: Literal[True] = True  # MMDiT always takes the pooled text.


class ClassConfig(SizedConfig):
    """Keys that DiG, DiS and DiM share: they take class labels, or no condition at all."""

    condition: Literal["class"] = "class"  # The network takes class labels only.
    pooled_text: Literal[False] = False  # The network takes no text.
    num_classes: NonNegative = 1000  # The number of classes; 0 is a network without a condition.


class DiGConfig(ClassConfig, TransformerConfig):
    """DiG: gated linear attention that scans the tokens in four directions in turn (Zhu et al. 2024)."""

    variants = DIG_VARIANTS

    kind: Literal["dig"] = "dig"  # The network.
    # Long skips join the output of each block of the first half to its counterpart in the second half; this is how
    # their linear layers start: xavier is random, identity lets the skips do nothing.
    skips: Literal["none", "xavier", "identity"] = "none"

    @model_validator(mode="after")
    def _keys_are_half_as_wide(self) -> DiGConfig:
        if self.hidden_size // 2 % self.num_heads:
            raise ValueError(
                f"hidden_size: half of {self.hidden_size} must be divisible by num_heads: {self.num_heads}"
            )
        if self.skips != "none" and self.depth % 2:
            raise ValueError(f"depth: {self.depth} must be even with skips: {self.skips}")
        return self


class DiSConfig(ClassConfig):
    """DiS: Mamba blocks that scan the tokens both ways, with long skips (Fei et al. 2024)."""

    variants = DIS_VARIANTS
    learned_positions = True

    kind: Literal["dis"] = "dis"  # The network.
    # Stochastic depth: how often training leaves out the last block; the blocks before it are left out less often.
    drop_path: BelowOne = 0.1


class DiMConfig(ClassConfig):
    """DiM: Mamba blocks that scan the tokens in four directions in turn, with long skips (Teng et al. 2024)."""

    variants = DIM_VARIANTS

    kind: Literal["dim"] = "dim"  # The network.
    learn_sigma: Literal[False] = False  # DiM predicts the noise only.
    # How the tokens that end each row and the whole grid are filled: lateral is for 256 pixels, rho for 512.
    pad: Literal["lateral", "rho"] = "lateral"
    first_timestep: NonNegative = 1  # What DiM calls the process's first timestep, which is 0 elsewhere.

    @model_validator(mode="after")
    def _a_middle(self) -> DiMConfig:
        if self.depth % 2 == 0:
            raise ValueError(
                f"depth: {self.depth} must be odd: a first block, then as many that push skips as pop them"
            )
        return self


def _kind(model: Any) -> str:
    """Return the kind of network that a section describes; without ``kind`` it is DiCo."""
    return str(model.get("kind", "dico")) if isinstance(model, Mapping) else getattr(model, "kind", "dico")


ModelConfig = Annotated[
    Annotated[DiCoConfig, Tag("dico")]
    | Annotated[DiTConfig, Tag("dit")]
    | Annotated[UViTConfig, Tag("uvit")]
    | Annotated[PixArtConfig, Tag("pixart")]
    | Annotated[MMDiTConfig, Tag("mmdit")]
    | Annotated[DiGConfig, Tag("dig")]
    | Annotated[DiSConfig, Tag("dis")]
    | Annotated[DiMConfig, Tag("dim")],
    Discriminator(_kind),
]
# The sections of all networks.
NETWORKS: tuple[type[NetworkConfig], ...] = tuple(part.__origin__ for part in get_args(get_args(ModelConfig)[0]))
