"""Frozen encoders: images to latents and back, captions to features. Local files are tried before any download."""

from dico_t2i.encoders.autoencoders import (
    Autoencoder,
    ChainAutoencoder,
    DiffusersAutoencoder,
    find_autoencoder,
    load_autoencoder,
    sample_latents,
)
from dico_t2i.encoders.cached import check_cached, with_measured
from dico_t2i.encoders.local import MissingModelError
from dico_t2i.encoders.text import TextEncoder, TextFeatures, find_text_encoder, load_text_encoder
from dico_t2i.encoders.vision import VisionEncoder, find_vision_encoder, load_vision_encoder

__all__ = [
    "Autoencoder",
    "ChainAutoencoder",
    "DiffusersAutoencoder",
    "MissingModelError",
    "TextEncoder",
    "TextFeatures",
    "VisionEncoder",
    "check_cached",
    "find_autoencoder",
    "find_text_encoder",
    "find_vision_encoder",
    "load_autoencoder",
    "load_text_encoder",
    "load_vision_encoder",
    "sample_latents",
    "with_measured",
]
