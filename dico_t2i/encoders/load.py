"""Loads the frozen encoders of a config, and checks that they fit its network."""

import torch

from dico_t2i.config import Config, ConfigError
from dico_t2i.encoders import Autoencoder, load_autoencoder, load_text_encoder
from dico_t2i.encoders.conditioner import Conditioner, find_fitting_text_encoder


def load_encoders(config: Config, device: torch.device, dtype: torch.dtype) -> tuple[Autoencoder, Conditioner]:
    """The frozen encoders of a config.

    Raises MissingModelError or ConfigError before anything is loaded if a text encoder is missing or does not fit.
    """
    if config.model.condition == "text":
        find_fitting_text_encoder(config)
    autoencoder = load_autoencoder(config.autoencoder, device, dtype)
    text = load_text_encoder(config.text_encoder, device, dtype) if config.model.condition == "text" else None
    conditioner = Conditioner(config.model, text, device)
    if autoencoder.latent_channels != config.model.in_channels:
        raise ConfigError(
            f"model.in_channels: {config.model.in_channels}, but the autoencoder's latents have"
            f" {autoencoder.latent_channels} channels"
        )
    return autoencoder, conditioner
