"""Frozen CLIP text towers: captions to 77 token features and one pooled feature.

Two libraries give the same features for the same weights and token ids, but they pad differently: after the end
token open_clip writes 0, transformers repeats the end token. The network sees those positions, so tokenizer
and pad id are part of an encoder's identity.
"""

import gzip
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dico_t2i.config import SeededTower, TextEncoderConfig
from dico_t2i.encoders.local import config_hash, file_hash, read_json, resolve
from dico_t2i.randomness import uniform

TOKENS = 77
VOCABULARY = 49408
END = VOCABULARY - 1

# Data workers are forked, after which the threads of the tokenizers library would hang.
os.environ["TOKENIZERS_PARALLELISM"] = "false"


class TextFeatures(NamedTuple):
    """tokens: (N, 77, width), after the final layer norm. pooled: (N, pooled_dim), at the end token."""

    tokens: Tensor
    pooled: Tensor


class Tokenizer(Protocol):
    """Captions to token ids; picklable, for data workers."""

    name: str
    pad_id: int

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(N,) strings -> (N, 77) int64, cut to 77 with the end token last, padded with ``pad_id``."""


class TransformersTokenizer:
    """CLIP's tokenizer as transformers has it; pads with the end token."""

    name = "transformers CLIPTokenizer"
    pad_id = END

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._backend.enable_truncation(TOKENS)
        self._backend.enable_padding(length=TOKENS, pad_id=END, pad_token="<|endoftext|>")

    def __call__(self, captions: Sequence[str]) -> Tensor:
        rows = [encoding.ids for encoding in self._backend.encode_batch(list(captions))]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, TOKENS)


class OpenClipTokenizer:
    """CLIP's tokenizer as open_clip has it; pads with 0."""

    name = "open_clip SimpleTokenizer"
    pad_id = 0

    def __init__(self) -> None:
        from open_clip import SimpleTokenizer

        self._backend = SimpleTokenizer()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return self._backend(list(captions), TOKENS)


@dataclass(frozen=True)
class TextEncoder:
    """A frozen text tower and its tokenizer.

    tokenize: captions -> (N, 77) int64; hand it to data workers on its own, it does not hold the tower.
    seeded: whether the tower is random, not pretrained. description: one line, to be printed with results.
    """

    tower: nn.Module
    tokenize: Tokenizer
    kind: str
    width: int
    pooled_dim: int
    seeded: bool
    description: str
    device: torch.device
    sources: dict[str, Path | str]

    @torch.no_grad()
    def encode(self, ids: Tensor) -> TextFeatures:
        """Features of token ids, in the tower's dtype. (N, 77) int64, any device."""
        ids = ids.to(self.device, non_blocking=True)
        if self.kind == "open_clip":
            pooled, tokens = self.tower(ids)
            return TextFeatures(tokens, pooled)
        output = self.tower(input_ids=ids)
        return TextFeatures(output.last_hidden_state, output.get("text_embeds", output.get("pooler_output")))

    def null(self) -> TextFeatures:
        """Features of the empty caption, which guidance starts from; N = 1."""
        return self.encode(self.tokenize([""]))

    def identity(self) -> dict[str, str]:
        """What cached features or a trained model depend on; equal for the same weights, tokenizer and padding."""
        files = {key: file_hash(v) if isinstance(v, Path) else v for key, v in self.sources.items()}
        return {
            "kind": self.kind,
            "tokenizer": self.tokenize.name,
            "pad_id": str(self.tokenize.pad_id),
            "seeded": str(self.seeded).lower(),
            **files,
        }
