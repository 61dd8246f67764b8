"""Checks that latents and text features stored with the samples come from the run's encoders."""

from dico_t2i.config import MEASURED, Config, ConfigError, DataConfig
from dico_t2i.data.index import DatasetIndex
from dico_t2i.data.sources import same_encoder
from dico_t2i.encoders.autoencoders import Autoencoder
from dico_t2i.encoders.text import TextEncoder


def with_measured(config: Config, index: DatasetIndex) -> Config:
    """The config with the numbers of the index in place of ``autoencoder.scale: measured``.

    Raises ConfigError if the index has none.
    """
    if config.autoencoder.scale != MEASURED:
        return config
    found = index.meta.get(MEASURED)
    if index.kind != "latents" or not found:
        raise ConfigError(
            f"autoencoder.scale: {index.location} has no measured mean and scale of its latents; encode its images with"
            " data_prep/latents.py, or give a number"
        )
    numbers = {key: tuple(found[key]) for key in ("mean", "scale")}
    return config.model_copy(update={"autoencoder": config.autoencoder.model_copy(update=numbers)})


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
