"""Whether latents and text features stored with the samples are those of a run's encoders."""

from dico_t2i.config import ConfigError, DataConfig
from dico_t2i.data.index import DatasetIndex
from dico_t2i.data.sources import same_encoder
from dico_t2i.encoders.autoencoders import Autoencoder
from dico_t2i.encoders.text import TextEncoder


def check_cached(
    data: DataConfig, index: DatasetIndex, autoencoder: Autoencoder, text_encoder: TextEncoder | None
) -> None:
    """Raise ConfigError if the data's cached latents, or the cached text that is wanted, were made by others."""
    pairs = []
    if index.kind == "latents":
        pairs.append(("autoencoder", "latents", autoencoder.identity()))
    if data.cached_text and text_encoder is not None:
        pairs.append(("text_encoder", "text features", text_encoder.identity()))
    for key, what, ours in pairs:
        made = index.meta.get(key, {})
        if not same_encoder(made, ours):
            raise ConfigError(
                f"{index.location} holds {what} of another {key}: {made}, the config has {ours};"
                f" set {key} to it, or encode again with data_prep/latents.py"
            )
