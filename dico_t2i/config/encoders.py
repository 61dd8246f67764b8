"""Config sections of the frozen encoders: autoencoder, text and vision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

from dico_t2i.config.base import Positive, PositiveFloat, Section, Seed
from dico_t2i.config.yaml12 import Text


class AutoencoderConfig(Section):
    """The frozen map between images and latents."""

    kind: Literal["kl", "tiny", "pixels"] = "kl"
    path: Text = "stabilityai/sd-vae-ft-ema"  # a local folder or a hub id
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
    seed: Seed = 0


class TextTowerConfig(Section):
    """One of several frozen text encoders."""

    kind: Literal["open_clip", "transformers", "t5"] = "transformers"  # the first two are CLIP's, by library
    # t5 and transformers: a local folder or a hub id; open_clip: an architecture such as ViT-L-14.
    model: Text = "openai/clip-vit-large-patch14"
    # pretrained, or seeded: random frozen weights, for machines without any.
    weights: Literal["pretrained", "seeded"] = "pretrained"
    pretrained: Text = "openai"  # open_clip only: a tag it knows, or a file of weights
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
    model: Text = "facebook/dinov2-base"  # a local folder or a hub id
    # pretrained, or seeded: random frozen weights, for machines without any.
    weights: Literal["pretrained", "seeded"] = "pretrained"
    image_size: Positive = 224  # pixels, square, that images are resized to; REPA: 224 for 256, 448 for 512
    seeded: SeededTower = SeededTower()  # of patches of 14x14 pixels


class AlignmentConfig(Section):
    """REPA (Yu et al. 2024): features of a block of the network are drawn to those of an image encoder."""

    block: Text  # its path in the network: stages.middle.4 is the fifth of DiCo's middle stage
    encoder: VisionEncoderConfig = VisionEncoderConfig()
    weight: PositiveFloat = 0.5  # of the mean negative cosine similarity, in the loss
    hidden: Positive = 2048  # width of the projector, an MLP of three layers that trains with the network
