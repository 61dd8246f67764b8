"""Chooses the caption of a sample that an epoch trains on, as a function of the seed and the position alone."""

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
    """The index of the chosen caption of each sample, according to ``data.captions``. positions: int64 (n,).

    "random" draws one of all captions. "weighted" first draws a source by ``data.caption_weights``, and then one of its
    captions. Each epoch draws again, since a sample has a new position there. "first" and "longest" (the first of
    equally long ones) never change.
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
    """The weight of each caption: its source's weight (1 by default), divided by the source's number of captions.

    If all weights are 0, all captions get the same weight.
    """
    counts = Counter(caption.source for caption in captions)
    weights = [by_source.get(caption.source, 1.0) / counts[caption.source] for caption in captions]
    return weights if any(weights) else [1.0] * len(captions)


def _drawn(draw: float, weights: Sequence[float]) -> int:
    """The index that a draw in [0, 1) selects, if the probability of each index is in proportion to its weight."""
    ends = list(accumulate(weights))
    return next((i for i, end in enumerate(ends) if draw * ends[-1] < end), len(ends) - 1)
