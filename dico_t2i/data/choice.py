"""Which caption of a sample an epoch trains on: a function of the seed and the sample's position alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from dico_t2i import randomness
from dico_t2i.config import DataConfig
from dico_t2i.data.sample import Caption


def choose_captions(data: DataConfig, seed: int, positions: Tensor, captions: Sequence[Sequence[Caption]]) -> list[int]:
    """The number of the caption of each sample, by ``data.captions``. positions: int64 (n,).

    "random" draws one of all, "weighted" first a source by ``data.caption_weights`` and then one of that source;
    a sample has a new position in each epoch. "first" and "longest" (of equally long ones the first) never change.
    """
    if data.captions == "first":
        return [0] * len(captions)
    if data.captions == "longest":
        return [max(range(len(texts)), key=lambda i: len(texts[i].text)) for texts in captions]
    if data.captions == "weighted":
        draws = randomness.uniform(seed, "weighted caption", positions).tolist()
        return [
            _drawn(draw, _weights(data.caption_weights, texts)) for draw, texts in zip(draws, captions, strict=True)
        ]
    counts = torch.tensor([len(texts) for texts in captions])
    return randomness.integers(seed, "caption", positions, counts).tolist()


def _weights(by_source: dict[str, float], captions: Sequence[Caption]) -> list[float]:
    """The weight of each caption: its source's, 1 where none is given, shared with the others of that source.

    Where all are 0 the captions weigh the same.
    """
    counts = Counter(caption.source for caption in captions)
    weights = [by_source.get(caption.source, 1.0) / counts[caption.source] for caption in captions]
    return weights if any(weights) else [1.0] * len(captions)


def _drawn(draw: float, weights: Sequence[float]) -> int:
    """The number whose part of the line from 0 to 1 a draw below 1 falls into, parts as long as the weights."""
    ends = list(accumulate(weights))
    return next((i for i, end in enumerate(ends) if draw * ends[-1] < end), len(ends) - 1)
