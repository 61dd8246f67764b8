"""Distributed text-to-image training of DiCo, a purely convolutional diffusion backbone.

``from dico_t2i import Pipeline, load_config, train``: docs/python.md shows them. They are imported when they are first
used, so that importing the package is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dico_t2i.config import load_config as load_config
    from dico_t2i.sampling.pipeline import Pipeline as Pipeline
    from dico_t2i.training.from_python import train as train

__version__ = "0.1.0"

_MODULES = {
    "Pipeline": "dico_t2i.sampling.pipeline",
    "load_config": "dico_t2i.config",
    "train": "dico_t2i.training.from_python",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
