"""Checks that latents and text features stored with the samples come from the run's encoders."""

from dico_t2i.config import ConfigError, DataConfig
from dico_t2i.data.index import DatasetIndex
from dico_t2i.data.sources import same_encoder
from dico_t2i.encoders.autoencoders import Autoencoder
from dico_t2i.encoders.text import TextEncoder


def check_cached(
    data: DataConfig, index: DatasetIndex, autoencoder: Autoencoder, text_encoder: TextEncoder | None
) -> None:
    """Raise ConfigError if cached latents, or cached text that the config uses, come from different encoders."""
    pairs = []
    if index.kind == "latents":
        pairs.append(("autoencoder", "latents", autoencoder.identity()))
    if data.cached_text and text_encoder is not None:
        pairs.append(("text_encoder", "text features", text_encoder.identity()))
    for key, what, ours in pairs:
        made = index.meta.get(key, {})
        if not same_encoder(made, ours):
            raise ConfigError(
                f"{index.location} holds {what} of a different {key}: {made}, but the config has {ours};"
                f" change {key} in the config, or encode the data again with data_prep/latents.py"
            )
