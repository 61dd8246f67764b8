"""Config sections of the networks: DiCo, the peers it is compared with, and their named sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Tag, model_validator

from dico_t2i.config.base import NonNegative, Positive, PositiveFloat, Probability, Section
from dico_t2i.config.yaml12 import Flag, Text

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


class NetworkConfig(Section):
    """What all networks share: their channels, and what they are conditioned on."""

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # sizes with a name, for `variant:` in a config
    stages: ClassVar[tuple[str, ...]] = ()  # of checkpoint_stages, most activations first

    kind: Text
    in_channels: Positive = 4
    learn_sigma: Flag = True
    condition: Literal["class", "text"] = "class"
    num_classes: Positive = 1000
    dropout_prob: Probability = 0.1  # of the condition, for guidance; 0 also drops the null class's row
    text_dim: Positive = 768  # of several encoders, that of the widest: the others are padded with zeros
    text_tokens: Positive = 77  # of all encoders together
    pooled_text: Flag = False  # add a projection of the pooled text to the timestep embedding
    pooled_dim: Positive = 768
    checkpoint_stages: tuple[Text, ...] = ()  # stages that recompute activations in the backward pass

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
    text_mask: Flag = False  # tokens of zeros are padding (T5's): attention leaves them out
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
    text_mask: Flag = False  # tokens of zeros are padding (T5's): attention leaves them out


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
