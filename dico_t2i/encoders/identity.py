"""Records which frozen encoders a network was trained with, and checks that the present ones are the same.

An identity consists of hashes of weights and config, and of the scale, but does not depend on where the files are.
"""

from collections.abc import Mapping
from typing import Any

from dico_t2i.config import ConfigError
from dico_t2i.data.sources import same_encoder
from dico_t2i.encoders.autoencoders import Autoencoder
from dico_t2i.encoders.text import TextEncoder

KEY = "encoders"  # the key of the identities in checkpoints and exports

Identities = dict[str, dict[str, str]]  # config section of the encoder -> its identity


def identities(autoencoder: Autoencoder, text_encoder: TextEncoder | None) -> Identities:
    """The identities of the autoencoder and of the text encoder, if there is one. Reads the weight files."""
    found = {"autoencoder": autoencoder.identity()}
    return found | ({"text_encoder": text_encoder.identity()} if text_encoder is not None else {})


def check_identities(trained: Mapping[str, Mapping[str, Any]], found: Identities, source: str) -> None:
    """Raise ConfigError if an encoder differs from that with which ``source``, a checkpoint or export, was trained."""
    for key, ours in found.items():
        made = trained.get(key, ours)
        if same_encoder(made, ours):
            continue
        parts = [part for part in sorted({*made, *ours}) if not same_encoder(_only(made, part), _only(ours, part))]
        shown = "; ".join(f"{part} was {_short(made.get(part))}, is {_short(ours.get(part))}" for part in parts)
        raise ConfigError(
            f"{source} was trained with a different {key}: {shown}. Images would be wrong without any error;"
            f" restore the files that {key} in its config.yaml names, or name a folder that has them"
        )


def _only(identity: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {part: identity[part]} if part in identity else {}


def _short(value: object) -> str:
    """The first 12 characters of a hash; other values unchanged."""
    text = str(value)
    return text[:12] if len(text) == 64 else text
