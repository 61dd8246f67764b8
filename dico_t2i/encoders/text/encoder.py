"""Frozen text encoders of one or several towers: captions to token features and, with CLIP, one pooled feature.

The two libraries give the same CLIP features for the same weights and token ids, but they pad differently: after the
end token open_clip writes 0, while transformers repeats the end token. The network sees those positions, so the
tokenizer and the pad id are part of an encoder's identity. T5 and the families of ``auto`` ignore their padding, and
their features are set to zero there, so that a network can distinguish padding from tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dico_t2i.encoders.local import quiet_transformers
from dico_t2i.encoders.text.clip import TransformersTokenizer
from dico_t2i.encoders.text.features import FeatureSize, TextFeatures, joined
from dico_t2i.encoders.text.tokenizers import JointTokenizer, Tokenizer
from dico_t2i.encoders.text.tower import Tower


class TextEncoder:
    """Frozen text towers, one or several, and their tokenizers.

    tokenize: captions -> (N, T) int64; it does not hold the towers, so that data workers can use it. sizes: those of
    each tower's features; width, pooled_dim: those of all together. seeded: whether a tower is random and not
    pretrained. description: one line to print with results.
    """

    def __init__(self, towers: Sequence[Tower], device: torch.device, dtype: torch.dtype, remember: int = 0) -> None:
        """remember: for how many different captions features are kept in memory."""
        self._remember, self._known = remember, dict[bytes, list[TextFeatures]]()
        self.seeded = any(tower.seeded for tower in towers)
        self.description = " + ".join(tower.description for tower in towers)
        parts = [tower.tokenize for tower in towers]
        self.tokenize: Tokenizer = JointTokenizer(parts) if len(parts) > 1 else parts[0]
        self._towers, self._device = towers, device
        for tower in towers:
            tower.module.to(device, dtype).eval().requires_grad_(False)
        nulls = self._encode_each(self.tokenize([""]))
        self.sizes = [FeatureSize(n.tokens.shape[1], n.tokens.shape[2], n.pooled.shape[1]) for n in nulls]
        self._null = joined(nulls)
        self.width, self.pooled_dim = self._null.tokens.shape[-1], self._null.pooled.shape[-1]

    def encode(self, ids: Tensor) -> TextFeatures:
        """Features of token ids (N, T) int64 on any device, in the dtype of the towers."""
        return joined(self._remembered(ids) if self._remember else self._encode_each(ids))

    def _remembered(self, ids: Tensor) -> list[TextFeatures]:
        """The features of each tower. Each row is encoded alone, so that they do not depend on other rows."""
        keys, rows = [row.tobytes() for row in ids.cpu().numpy()], []
        for key, row in zip(keys, ids, strict=True):
            found = self._known.get(key) or self._encode_each(row[None])
            if len(self._known) < self._remember:
                self._known.setdefault(key, found)
            rows.append(found)
        return [TextFeatures(*map(torch.cat, zip(*tower, strict=True))) for tower in zip(*rows, strict=True)]

    @torch.no_grad()
    def _encode_each(self, ids: Tensor) -> list[TextFeatures]:
        parts = ids.to(self._device, non_blocking=True).split([tower.tokenize.tokens for tower in self._towers], dim=1)
        return [tower.encode(part) for tower, part in zip(self._towers, parts, strict=True)]

    def null(self) -> TextFeatures:
        """Features of the empty caption, which is the null condition of guidance; N = 1."""
        return self._null

    def save(self, tower: Path, tokenizer: Path) -> str:
        """Write tower and tokenizer in transformers' format, and return the name of the tower's class.

        Raises ValueError for anything but a single CLIP of transformers.
        """
        if not isinstance(self.tokenize, TransformersTokenizer):
            raise ValueError(
                "text_encoder: only a single CLIP of kind: transformers can be written in transformers' format"
            )
        clip: Any = self._towers[0].module
        module = clip.as_transformers()
        with quiet_transformers():
            module.save_pretrained(tower)
        self.tokenize.save(tower)  # here, too, so that this package finds the whole model in one folder
        self.tokenize.save(tokenizer)
        return type(module).__name__

    def identity(self) -> dict[str, str]:
        """Everything that the features depend on, such as weights, tokenizer and padding. Reads the weight files."""
        first, *others = self._towers
        also = {f"also.{n}.{key}": v for n, tower in enumerate(others) for key, v in tower.identity().items()}
        return {**first.identity(), **also}
