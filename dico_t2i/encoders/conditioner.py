"""Labels or text as the network takes them, and their absence."""

import torch
from torch import Tensor

from dico_t2i.config import ConfigError, DiCoConfig
from dico_t2i.data import Batch
from dico_t2i.encoders.text import TextEncoder

Conditioning = dict[str, Tensor]


class Conditioner:
    """Makes the network's keyword arguments: ``cond`` and, with pooled_text, ``pooled``.

    Raises ConfigError when the text encoder's features do not have the sizes the network was configured for.
    """

    def __init__(self, model: DiCoConfig, text_encoder: TextEncoder | None, device: torch.device) -> None:
        self.model, self.text_encoder, self.device = model, text_encoder, device
        if text_encoder is None:
            return
        for key, size in (("text_dim", text_encoder.width), ("pooled_dim", text_encoder.pooled_dim)):
            wanted = getattr(model, key)
            if size != wanted and (key == "text_dim" or model.pooled_text):
                raise ConfigError(f"model.{key}: {wanted}, but the text encoder gives {size}; set model.{key}={size}")

    @torch.no_grad()
    def of_batch(self, batch: Batch) -> Conditioning:
        """Of a micro-batch's labels, stored text features, or captions' tokens."""
        if batch.labels is not None:
            return self.of_labels(batch.labels)
        if batch.text is not None and batch.pooled is not None:
            return self.of_features(batch.text, batch.pooled)
        assert batch.tokens is not None
        return self.of_tokens(batch.tokens)

    def of_labels(self, labels: Tensor) -> Conditioning:
        """labels (N,) int64; num_classes is the null class. Raises ValueError for labels out of range."""
        highest = self.model.num_classes - (self.model.dropout_prob == 0)
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= highest:
            raise ValueError(f"labels must lie in 0..{highest}, found {int(labels.min())}..{int(labels.max())}")
        return {"cond": labels.to(self.device)}

    def of_tokens(self, ids: Tensor) -> Conditioning:
        """Token ids (N, 77) -> cond (N, 77, text_dim), pooled (N, pooled_dim)."""
        assert self.text_encoder is not None
        features = self.text_encoder.encode(ids)
        return self._keep(features.tokens, features.pooled)

    def of_features(self, tokens: Tensor, pooled: Tensor) -> Conditioning:
        """Stored features (N, 77, text_dim), (N, pooled_dim), in the encoder's dtype. Raises ValueError for others."""
        null = self.null(len(tokens))
        features = self._keep(tokens.to(null["cond"]), pooled.to(null["cond"]))
        for name, value in features.items():
            found, wanted = tuple(value.shape[1:]), tuple(null[name].shape[1:])
            if found != wanted:
                raise ValueError(f"stored text features are {found}, the text encoder's {wanted}")
        return features

    def of_prompts(self, prompts: list[str]) -> Conditioning:
        assert self.text_encoder is not None
        return self.of_tokens(self.text_encoder.tokenize(prompts))

    def null(self, count: int) -> Conditioning:
        """The conditioning of "" or of the null class, ``count`` times."""
        if self.text_encoder is None:
            return {"cond": torch.full((count,), self.model.num_classes, device=self.device)}
        features = self.text_encoder.null()
        return self._keep(features.tokens.expand(count, -1, -1), features.pooled.expand(count, -1))

    def drop(self, conditioning: Conditioning, dropped: Tensor) -> Conditioning:
        """Replace the samples that ``dropped`` (N,) bool marks by null."""
        null = self.null(len(dropped))
        return {
            name: torch.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), null[name], value)
            for name, value in conditioning.items()
        }

    def _keep(self, tokens: Tensor, pooled: Tensor) -> Conditioning:
        return {"cond": tokens, "pooled": pooled} if self.model.pooled_text else {"cond": tokens}
