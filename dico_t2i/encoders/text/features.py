"""The features that text encoders return, and their sizes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TextFeatures(NamedTuple):
    """tokens: (N, T, width), after the final layer norm. pooled: (N, pooled_dim), at the end token; T5 has none (N, 0).

    T is 77 with CLIP. The tokens of several towers follow one another, padded with zeros to the width of the widest,
    and their pooled features are concatenated.
    """

    tokens: Tensor
    pooled: Tensor


class FeatureSize(NamedTuple):
    """The sizes of a tower's features: (N, tokens, width) and (N, pooled_dim)."""

    tokens: int
    width: int
    pooled_dim: int


class TowerSize(NamedTuple):
    """A tower's sizes. layers: the weights that each token is multiplied with. table: those of the token embedding."""

    features: FeatureSize
    layers: int
    table: int


def joined(features: Sequence[TextFeatures]) -> TextFeatures:
    """Concatenate the features of several towers as those of one encoder."""
    if len(features) == 1:
        return features[0]
    width = max(tokens.shape[-1] for tokens, _ in features)
    padded = [F.pad(tokens, (0, width - tokens.shape[-1])) for tokens, _ in features]
    return TextFeatures(torch.cat(padded, dim=1), torch.cat([pooled for _, pooled in features], dim=1))
