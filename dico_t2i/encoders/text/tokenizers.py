"""Tokenizers: captions to token ids."""

import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# The threads of the tokenizers library would hang in data workers, which are forked.
os.environ["TOKENIZERS_PARALLELISM"] = "false"


class Tokenizer(Protocol):
    """Maps captions to token ids; it can be pickled, for data workers."""

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Token ids of N captions, (N, T) int64."""


class TowerTokenizer(Tokenizer, Protocol):
    """The tokenizer of one tower: captions are cut to ``tokens``, keeping the end token, or padded with ``pad_id``."""

    name: str
    pad_id: int
    tokens: int


class FastTokenizer:
    """A tokenizer of the tokenizers library, whose post-processor adds the end token."""

    def __init__(self, backend: Any, tokens: int, pad_id: int, pad_token: str) -> None:
        self._backend, self.tokens, self.pad_id = backend, tokens, pad_id
        self._backend.enable_truncation(tokens)
        self._backend.enable_padding(length=tokens, pad_id=pad_id, pad_token=pad_token)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        rows = [encoding.ids for encoding in self._backend.encode_batch(list(captions))]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, self.tokens)


class JointTokenizer:
    """Concatenates the token ids of several tokenizers."""

    def __init__(self, parts: Sequence[TowerTokenizer]) -> None:
        self.parts = parts

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return torch.cat([part(captions) for part in self.parts], dim=1)
