"""A family of text encoders: a module of this folder with the functions of ``Family``."""

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor, nn

from dico_t2i.config import TextTowerConfig
from dico_t2i.encoders.text.features import TextFeatures, TowerSize
from dico_t2i.encoders.text.tokenizers import TowerTokenizer
from dico_t2i.encoders.text.tower import Tower

_MODULES = {"transformers": "clip"}  # kinds whose module has a different name


class Family(Protocol):
    """The functions that the module of a family has."""

    def files(self, config: TextTowerConfig) -> list[Path]:
        """The files of a pretrained tower. Raises MissingModelError if one cannot be found."""

    def source(self, config: TextTowerConfig) -> str:
        """The folder, hub id or file that a pretrained tower comes from."""

    def load(self, config: TextTowerConfig) -> Tower:
        """Load a pretrained tower. Raises ValueError if the files belong to a different family."""

    def features(self, tower: Tower, ids: Tensor) -> TextFeatures:
        """The features of token ids (N, T)."""

    def settings_of(self, config: TextTowerConfig) -> Any:
        """The architecture of a pretrained tower, which may be known without its weights. Raises MissingModelError."""

    def size(self, config: TextTowerConfig, settings: Any) -> TowerSize:
        """The sizes of a pretrained tower. Raises KeyError for settings of a different family."""

    def seeded(self, config: TextTowerConfig) -> tuple[nn.Module, TowerTokenizer]:
        """A tower of the config's size, whose weights are set afterwards."""

    def seeded_size(self, config: TextTowerConfig) -> TowerSize:
        """The sizes of a seeded tower."""


def family(kind: str) -> Family:
    """The family that ``text_encoder.kind`` names."""
    return cast(Family, import_module(f"dico_t2i.encoders.text.{_MODULES.get(kind, kind)}"))
