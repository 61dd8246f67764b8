"""What text encoders give, and its sizes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TextFeatures(NamedTuple):
    """tokens: (N, T, width), after the final layer norm. pooled: (N, pooled_dim), at the end token; T5 has none (N, 0).

    T is 77 of CLIP. Of several towers the tokens follow one another, padded with zeros to the widest's width, and the
    pooled features lie side by side.
    """

    tokens: Tensor
    pooled: Tensor


class FeatureSize(NamedTuple):
    """Of a tower's features: (N, tokens, width), (N, pooled_dim)."""

    tokens: int
    width: int
    pooled_dim: int


class TowerSize(NamedTuple):
    """A tower's sizes. layers: weights multiplied with every token. table: weights of the token embedding."""

    features: FeatureSize
    layers: int
    table: int


def joined(features: Sequence[TextFeatures]) -> TextFeatures:
    """The features of several towers as those of one encoder."""
    if len(features) == 1:
        return features[0]
    width = max(tokens.shape[-1] for tokens, _ in features)
    padded = [F.pad(tokens, (0, width - tokens.shape[-1])) for tokens, _ in features]
    return TextFeatures(torch.cat(padded, dim=1), torch.cat([pooled for _, pooled in features], dim=1))
