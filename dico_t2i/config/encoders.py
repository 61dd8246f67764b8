"""Config sections for the frozen encoders: autoencoder, text encoder and image encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import ValidationError, ValidatorFunctionWrapHandler, field_validator, model_validator

from dico_t2i.config.base import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, Seed
from dico_t2i.config.yaml12 import Text

MEASURED: Final = "measured"  # the scale that stands for numbers in the index of the latents


class AutoencoderConfig(Section):
    """The frozen autoencoder between images and latents."""

    # kl is Stable Diffusion's autoencoder, tiny is TAESD and its family, and pixels trains without an autoencoder.
    kind: Literal["kl", "tiny", "pixels"] = "kl"
    path: Text = "stabilityai/sd-vae-ft-ema"  # A local folder, the URL of a folder, or a hub id.
    # The factor that latents are multiplied by for the network, or one factor for each channel; its default is 1 for
    # tiny and pixels. measured takes mean and scale from the index of the latents, so that each channel has mean 0 and
    # variance 1; the config that is saved with the run holds the numbers.
    scale: PositiveFloat | tuple[PositiveFloat, ...] | Literal["measured"] = 0.18215
    # What is subtracted from each channel of the latents before they are multiplied; with none nothing is.
    mean: tuple[float, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _scale_of_kind(cls, data: Any) -> Any:
        """Set the scale to 1 except for Stable Diffusion's autoencoders, whose latents do not have unit variance."""
        if isinstance(data, Mapping) and data.get("kind", "kl") != "kl" and "scale" not in data:
            return {**data, "scale": 1.0}
        return data

    @field_validator("scale", mode="wrap")
    @classmethod
    def _one_error(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        """Give one error in place of one for each form that a scale may have."""
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"give a number above 0, one for each channel, or measured; found {value!r}") from None

    @model_validator(mode="after")
    def _mean_is_of_numbers(self) -> AutoencoderConfig:
        if self.mean is not None and self.scale == MEASURED:
            raise ValueError("mean: scale: measured measures it, too; leave it out")
        if self.kind == "pixels" and (self.mean is not None or not isinstance(self.scale, float)):
            raise ValueError("scale: kind: pixels has no latents; leave out scale and mean")
        return self


class SeededTower(Section):
    """The size of a randomly initialised encoder."""

    width: Positive = 128  # The width of the hidden layers.
    layers: Positive = 2  # The number of layers.
    heads: Positive = 4  # The number of attention heads.
    seed: Seed = 0  # The seed of the random weights.


class TextTowerConfig(Section):
    """One of several frozen text encoders."""

    # The family of encoder: CLIP from open_clip, CLIP from transformers, T5, or with auto any other that transformers'
    # AutoModel loads, such as BERT.
    kind: Literal["open_clip", "transformers", "t5", "auto"] = "transformers"
    # For t5 and transformers, a local folder, the URL of a folder, or a hub id; for open_clip, an architecture such as
    # ViT-L-14. auto takes what t5 takes. package:NAME/FOLDER is a folder of an installed Python package.
    model: Text = "openai/clip-vit-large-patch14"
    # pretrained loads weights; seeded makes random frozen weights, for machines that have none.
    weights: Literal["pretrained", "seeded"] = "pretrained"
    pretrained: Text = "openai"  # For open_clip only: a tag that it knows, or a file, folder, URL or hub id of weights.
    # The number of tokens that captions are cut or padded to; only t5 and auto take numbers other than 77.
    tokens: Positive = 77
    seeded: SeededTower = SeededTower()  # The size of the encoder with weights: seeded.

    @model_validator(mode="after")
    def _positions(self) -> TextTowerConfig:
        if self.kind in ("open_clip", "transformers") and self.tokens != 77:
            raise ValueError(f"tokens: {self.tokens}, but CLIP always has 77 tokens; leave it out")
        return self


class TextEncoderConfig(TextTowerConfig):
    """The frozen text encoder."""

    also: tuple[TextTowerConfig, ...] = ()  # Further encoders, whose tokens follow those of the first in the sequence.
    # For how many different captions features are kept in memory, on the device, once they were computed; useful where
    # captions repeat, as those of classes do. A caption of 16 tokens of width 384 takes 25 KB in fp32.
    remember: NonNegative = 0
    # The deviation of the noise that training adds to the text's features, in units of each token's root mean square.
    # It is meant for captions of few different words, which a network would learn by heart.
    noise: NonNegativeFloat = 0.0

    @property
    def towers(self) -> tuple[TextTowerConfig, ...]:
        return (self, *self.also)


class VisionEncoderConfig(Section):
    """A frozen image encoder that gives features of image patches."""

    # The library that the encoder comes from; tiny is the encoder of a tiny autoencoder in TAESD's own files.
    kind: Literal["transformers", "timm", "tiny"] = "transformers"
    model: Text = "facebook/dinov2-base"  # A local folder, the URL of a folder, or a hub id.
    # pretrained loads weights; seeded makes random frozen weights, for machines that have none.
    weights: Literal["pretrained", "seeded"] = "pretrained"
    # Height and width in pixels that images are resized to; REPA takes 224 for images of 256 and 448 for 512.
    image_size: Positive = 224
    seeded: SeededTower = SeededTower()  # The size of the encoder with weights: seeded; its patches have 14x14 pixels.

    @model_validator(mode="after")
    def _tiny_is_pretrained(self) -> VisionEncoderConfig:
        if self.kind == "tiny" and self.weights == "seeded":
            raise ValueError("weights: kind: tiny has no seeded form; give model, or another kind")
        return self


class AlignmentConfig(Section):
    """REPA (Yu et al. 2024): trains the features of one block to match those of a frozen image encoder."""

    # The path of the aligned block in the network; stages.middle.4 is the fifth block of DiCo's middle stage.
    block: Text
    encoder: VisionEncoderConfig = VisionEncoderConfig()  # The image encoder whose features are the target.
    weight: PositiveFloat = 0.5  # The weight of the mean negative cosine similarity in the loss.
    hidden: Positive = 2048  # The hidden width of the projector, an MLP of three layers that trains with the network.
