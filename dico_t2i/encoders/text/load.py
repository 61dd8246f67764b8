"""Loads text encoders, and finds their files and sizes without loading them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dico_t2i.config import TextEncoderConfig, TextTowerConfig
from dico_t2i.encoders.text.encoder import TextEncoder
from dico_t2i.encoders.text.family import family
from dico_t2i.encoders.text.features import TowerSize
from dico_t2i.encoders.text.seeded import load_seeded


def load_text_encoder(
    config: TextEncoderConfig, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """The text encoder of a config, in eval mode.

    Raises MissingModelError, before any heavy import, when its files are not here, and ValueError when they
    are not those of a CLIP text tower with 77 positions, or of a T5.
    """
    find_text_encoder(config)  # of all towers, before the first is loaded
    towers = []
    for number, tower in enumerate(config.towers):
        with _naming(number):
            load = load_seeded if tower.weights == "seeded" else family(tower.kind).load
            towers.append(load(tower))
    return TextEncoder(towers, torch.device(device), dtype)


def find_text_encoder(config: TextEncoderConfig) -> list[Path]:
    """The files of all towers; none of seeded ones. Raises MissingModelError when one is not here."""
    files = []
    for number, tower in enumerate(config.towers):
        with _naming(number):
            files += find_tower(tower)
    return files


def find_tower(config: TextTowerConfig) -> list[Path]:
    """The files of one tower; none of a seeded one. Raises MissingModelError when one is not here."""
    return [] if config.weights == "seeded" else family(config.kind).files(config)


def pretrained_source(config: TextTowerConfig) -> str:
    """The folder, hub id or file that a pretrained tower comes from."""
    return family(config.kind).source(config)


def text_sizes(config: TextEncoderConfig) -> list[TowerSize]:
    """Of all towers. Raises MissingModelError where a config is neither here nor known, ValueError if it is foreign."""
    sizes = []
    for number, tower in enumerate(config.towers):
        with _naming(number):
            try:
                sizes.append(_size(tower))
            except KeyError as error:
                raise ValueError(
                    f"text_encoder.model: the config of {tower.model} has no {error}; is it {tower.kind}'s?"
                ) from None
    return sizes


def _size(config: TextTowerConfig) -> TowerSize:
    of = family(config.kind)
    return of.seeded_size(config) if config.weights == "seeded" else of.size(config, of.settings_of(config))


@contextmanager
def _naming(number: int) -> Iterator[None]:
    """Errors name keys of the first tower; those of others get their place in the list."""
    try:
        yield
    except ValueError as error:
        if number == 0:
            raise
        raise type(error)(str(error).replace("text_encoder.", f"text_encoder.also.{number - 1}.")) from error
