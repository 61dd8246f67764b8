"""Which frozen encoders a network was trained with, and whether those at hand are the same.

An identity tells weights, config and scale by hashes; where the files lie is no part of it.
"""

from collections.abc import Mapping
from typing import Any

from dico_t2i.config import ConfigError
from dico_t2i.data.sources import same_encoder
from dico_t2i.encoders.autoencoders import Autoencoder
from dico_t2i.encoders.text import TextEncoder

KEY = "encoders"  # under which checkpoints and exports keep the identities

Identities = dict[str, dict[str, str]]  # by the encoder's config section


def identities(autoencoder: Autoencoder, text_encoder: TextEncoder | None) -> Identities:
    """Of the autoencoder and, if there is one, the text encoder. Reads the files of weights."""
    found = {"autoencoder": autoencoder.identity()}
    return found | ({"text_encoder": text_encoder.identity()} if text_encoder is not None else {})


def check_identities(trained: Mapping[str, Mapping[str, Any]], found: Identities, source: str) -> None:
    """Raise ConfigError if any encoder is not the one that ``source``, a checkpoint or an export, was made with."""
    for key, ours in found.items():
        made = trained.get(key, ours)
        if same_encoder(made, ours):
            continue
        parts = [part for part in sorted({*made, *ours}) if not same_encoder(_only(made, part), _only(ours, part))]
        shown = "; ".join(f"{part} was {_short(made.get(part))}, is {_short(ours.get(part))}" for part in parts)
        raise ConfigError(
            f"{source} was trained with another {key}: {shown}. With this one the images would be"
            f" wrong: put back the files that {key} in its config.yaml names, or name a folder that has them"
        )


def _only(identity: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {part: identity[part]} if part in identity else {}


def _short(value: object) -> str:
    """The beginning of a hash tells it well enough."""
    text = str(value)
    return text[:12] if len(text) == 64 else text
