"""Exports a model's weights, config and code to a folder, for sampling with this package and with diffusers."""

from dico_t2i.export.folder import export

__all__ = ["export"]
