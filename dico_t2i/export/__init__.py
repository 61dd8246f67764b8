"""Folders with a model's weights, config and code, for sampling here and for diffusers."""

from dico_t2i.export.folder import export

__all__ = ["export"]
