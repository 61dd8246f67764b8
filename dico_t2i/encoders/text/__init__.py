"""Frozen text encoders: one module for each family, and the parts that they share."""

from dico_t2i.encoders.text.encoder import TextEncoder
from dico_t2i.encoders.text.features import FeatureSize, TextFeatures, TowerSize
from dico_t2i.encoders.text.load import (
    find_text_encoder,
    find_tower,
    load_text_encoder,
    pretrained_source,
    text_sizes,
)
from dico_t2i.encoders.text.tokenizers import Tokenizer

__all__ = [
    "FeatureSize",
    "TextEncoder",
    "TextFeatures",
    "Tokenizer",
    "TowerSize",
    "find_text_encoder",
    "find_tower",
    "load_text_encoder",
    "pretrained_source",
    "text_sizes",
]
