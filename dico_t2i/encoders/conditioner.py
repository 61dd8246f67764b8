"""Turns labels or text into the network's inputs, and provides the null condition."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dico_t2i import randomness
from dico_t2i.config import Config, ConfigError, DiCoConfig, NetworkConfig
from dico_t2i.data.batches import Batch, Wanted
from dico_t2i.encoders.text import FeatureSize, TextEncoder, find_text_encoder, text_sizes

Conditioning = dict[str, Tensor]


class Conditioner:
    """Makes the network's keyword arguments: ``cond`` and, with pooled_text, ``pooled``.

    Raises ConfigError if the sizes of the text encoder's features differ from those in the network's config.
    """

    def __init__(self, model: NetworkConfig, text_encoder: TextEncoder | None, device: torch.device) -> None:
        self.model, self.text_encoder, self.device = model, text_encoder, device
        if text_encoder is not None:
            check_text(model, text_encoder.sizes)

    @property
    def wanted(self) -> Wanted:
        """The parts of each sample that a loader has to prepare."""
        tokenize = self.text_encoder.tokenize if self.text_encoder else None
        return Wanted(self.model.condition, self.model.num_classes, tokenize)

    @torch.no_grad()
    def of_batch(self, batch: Batch) -> Conditioning:
        """The conditioning of a micro-batch: of its labels, its stored text features, or the tokens of its captions."""
        if batch.labels is not None:
            return self.of_labels(batch.labels)
        if batch.text is not None and batch.pooled is not None:
            return self.of_features(batch.text, batch.pooled)
        assert batch.tokens is not None
        return self.of_tokens(batch.tokens)

    def of_labels(self, labels: Tensor) -> Conditioning:
        """The conditioning of labels (N,) int64, where num_classes is the null class.

        Raises ValueError for labels out of range.
        """
        highest = max(0, self.model.num_classes - (self.model.dropout_prob == 0))
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= highest:
            raise ValueError(f"labels must be in 0..{highest}, found {int(labels.min())}..{int(labels.max())}")
        return {"cond": labels.to(self.device)}

    def of_tokens(self, ids: Tensor) -> Conditioning:
        """The conditioning of token ids (N, T): cond (N, T, text_dim) and pooled (N, pooled_dim)."""
        assert self.text_encoder is not None
        features = self.text_encoder.encode(ids)
        return self._keep(features.tokens, features.pooled)

    def of_features(self, tokens: Tensor, pooled: Tensor) -> Conditioning:
        """The conditioning of stored features (N, T, text_dim) and (N, pooled_dim), in the encoder's dtype.

        Raises ValueError if their shapes are not those of the text encoder.
        """
        null = self.null(len(tokens))
        features = self._keep(tokens.to(null["cond"]), pooled.to(null["cond"]))
        for name, value in features.items():
            found, wanted = tuple(value.shape[1:]), tuple(null[name].shape[1:])
            if found != wanted:
                raise ValueError(f"stored text features are {found}, but those of the text encoder are {wanted}")
        return features

    def of_prompts(self, prompts: list[str]) -> Conditioning:
        """The conditioning of prompts."""
        assert self.text_encoder is not None
        return self.of_tokens(self.text_encoder.tokenize(prompts))

    def null(self, count: int) -> Conditioning:
        """The conditioning of "" or of the null class, ``count`` times. Raises ValueError if there is no such class."""
        if self.text_encoder is None:
            if not self.model.dropout_prob:
                raise ValueError("guidance: it must be 1, since this model has no null class (model.dropout_prob: 0)")
            return {"cond": torch.full((count,), self.model.num_classes, device=self.device)}
        features = self.text_encoder.null()
        return self._keep(features.tokens.expand(count, -1, -1), features.pooled.expand(count, -1))

    def drop(self, conditioning: Conditioning, dropped: Tensor) -> Conditioning:
        """Replace the samples that ``dropped`` (N,) bool marks by the null conditioning."""
        if not self.model.dropout_prob:
            return conditioning
        null = self.null(len(dropped))
        return {
            name: torch.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), null[name], value)
            for name, value in conditioning.items()
        }

    def add_noise(self, conditioning: Conditioning, deviation: float, seed: int, position: Tensor) -> Conditioning:
        """Add normal noise to the features of texts, in units of the root mean square of each token and pooled feature.

        Padding stays zero. position (N,) int64: the draws depend on the seed and on a sample's position.
        """
        if not deviation or self.text_encoder is None:
            return conditioning
        return {
            name: value + deviation * _scale(value) * _noise(seed, f"{name}_noise", position, value)
            for name, value in conditioning.items()
        }

    def _keep(self, tokens: Tensor, pooled: Tensor) -> Conditioning:
        return {"cond": tokens, "pooled": pooled} if self.model.pooled_text else {"cond": tokens}


def _scale(features: Tensor) -> Tensor:
    """The root mean square over the last dimension, which stays with size 1."""
    return features.float().square().mean(-1, keepdim=True).sqrt().to(features.dtype)


def _noise(seed: int, purpose: str, position: Tensor, like: Tensor) -> Tensor:
    return randomness.normal(seed, purpose, position, like.shape[1:]).to(like.dtype)


def find_fitting_text_encoder(config: Config) -> list[Path]:
    """The files of a text encoder whose features fit the network.

    Raises MissingModelError if a file cannot be found, and ConfigError if the features do not fit.
    """
    files = find_text_encoder(config.text_encoder)
    check_text(config.model, [size.features for size in text_sizes(config.text_encoder)])
    return files


def check_text(model: NetworkConfig, sizes: Sequence[FeatureSize]) -> None:
    """Raise ConfigError if the network's config does not match the sizes of the text encoders' features."""
    each = tuple((size.tokens, size.width) for size in sizes)
    found = {"text_dim": max(width for _, width in each), "text_tokens": sum(tokens for tokens, _ in each)}
    if model.pooled_text:
        found["pooled_dim"] = sum(size.pooled_dim for size in sizes)
        if not found["pooled_dim"]:
            raise ConfigError("model.pooled_text: T5 has no pooled feature; set model.pooled_text=false")
    for key, size in found.items():
        if size != getattr(model, key):
            wanted = getattr(model, key)
            raise ConfigError(f"model.{key}: {wanted}, but the text encoder gives {size}; set model.{key}={size}")
    inputs = model.text_inputs if isinstance(model, DiCoConfig) else ()
    if inputs and inputs != each:
        shown = [[*map(list, sizes)] for sizes in (inputs, each)]
        raise ConfigError(f"model.text_inputs: {shown[0]}, but the text encoders give {shown[1]}")
