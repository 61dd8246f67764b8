"""Captions to token ids."""

import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# Data workers are forked, after which the threads of the tokenizers library would hang.
os.environ["TOKENIZERS_PARALLELISM"] = "false"


class Tokenizer(Protocol):
    """Captions to token ids; picklable, for data workers."""

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(N,) strings -> (N, T) int64."""


class TowerTokenizer(Tokenizer, Protocol):
    """Of one tower: T is ``tokens``, captions are cut with the end token last, or padded with ``pad_id``."""

    name: str
    pad_id: int
    tokens: int


class FastTokenizer:
    """A tokenizer of the tokenizers library; its post-processor adds the end token."""

    def __init__(self, backend: Any, tokens: int, pad_id: int, pad_token: str) -> None:
        self._backend, self.tokens, self.pad_id = backend, tokens, pad_id
        self._backend.enable_truncation(tokens)
        self._backend.enable_padding(length=tokens, pad_id=pad_id, pad_token=pad_token)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        rows = [encoding.ids for encoding in self._backend.encode_batch(list(captions))]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, self.tokens)


class JointTokenizer:
    """Several tokenizers' ids, one after the other."""

    def __init__(self, parts: Sequence[TowerTokenizer]) -> None:
        self.parts = parts

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return torch.cat([part(captions) for part in self.parts], dim=1)
