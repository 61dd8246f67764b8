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

    Raises MissingModelError, before any slow import, if its files cannot be found, and ValueError if they do not
    belong to a CLIP text tower with 77 positions, or to a T5.
    """
    find_text_encoder(config)  # find the files of all towers before the first one is loaded
    towers = []
    for number, tower in enumerate(config.towers):
        with _naming(number):
            load = load_seeded if tower.weights == "seeded" else family(tower.kind).load
            towers.append(load(tower))
    return TextEncoder(towers, torch.device(device), dtype, config.remember)


def find_text_encoder(config: TextEncoderConfig) -> list[Path]:
    """The files of all towers; seeded ones have none. Raises MissingModelError if one cannot be found."""
    files = []
    for number, tower in enumerate(config.towers):
        with _naming(number):
            files += find_tower(tower)
    return files


def find_tower(config: TextTowerConfig) -> list[Path]:
    """The files of one tower; a seeded one has none. Raises MissingModelError if one cannot be found."""
    return [] if config.weights == "seeded" else family(config.kind).files(config)


def pretrained_source(config: TextTowerConfig) -> str:
    """The folder, hub id or file that a pretrained tower comes from."""
    return family(config.kind).source(config)


def text_sizes(config: TextEncoderConfig) -> list[TowerSize]:
    """The sizes of all towers.

    Raises MissingModelError if a tower's config is neither found nor known, and ValueError if it has a different form.
    """
    sizes = []
    for number, tower in enumerate(config.towers):
        with _naming(number):
            try:
                sizes.append(_size(tower))
            except KeyError as error:
                raise ValueError(
                    f"text_encoder.model: the config of {tower.model} has no {error}; is it of kind: {tower.kind}?"
                ) from None
    return sizes


def _size(config: TextTowerConfig) -> TowerSize:
    of = family(config.kind)
    return of.seeded_size(config) if config.weights == "seeded" else of.size(config, of.settings_of(config))


@contextmanager
def _naming(number: int) -> Iterator[None]:
    """Correct the key in errors: they name text_encoder, which becomes text_encoder.also.N for further towers."""
    try:
        yield
    except ValueError as error:
        if number == 0:
            raise
        raise type(error)(str(error).replace("text_encoder.", f"text_encoder.also.{number - 1}.")) from error
