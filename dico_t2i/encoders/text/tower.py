"""A loaded text tower of any family."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from dico_t2i.encoders.local import file_hash
from dico_t2i.encoders.text.features import TextFeatures
from dico_t2i.encoders.text.tokenizers import TowerTokenizer


@dataclass(frozen=True)
class Tower:
    """A text tower and its tokenizer.

    features: the function from token ids (N, T) to features. sources: parts of its identity; a path stands for the hash
    of its file.
    """

    module: nn.Module
    tokenize: TowerTokenizer
    features: Callable[["Tower", Tensor], TextFeatures]
    description: str
    sources: dict[str, str | Path]
    kind: str
    seeded: bool = False

    def encode(self, ids: Tensor) -> TextFeatures:
        return self.features(self, ids)

    def identity(self) -> dict[str, str]:
        """Everything that the features depend on. Reads the weight files."""
        sources = {key: file_hash(v) if isinstance(v, Path) else v for key, v in self.sources.items()}
        return {
            "kind": self.kind,
            "seeded": str(self.seeded).lower(),
            "tokenizer": self.tokenize.name,
            "pad_id": str(self.tokenize.pad_id),
            **({"tokens": str(self.tokenize.tokens)} if self.kind in ("t5", "auto") else {}),
            **sources,
        }
