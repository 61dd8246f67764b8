"""Turns a micro-batch of data into the inputs of the network and of the loss."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dico_t2i import randomness
from dico_t2i.config import Config
from dico_t2i.data.batches import Batch
from dico_t2i.diffusion import Process
from dico_t2i.encoders import Autoencoder
from dico_t2i.encoders.conditioner import Conditioner, Conditioning
from dico_t2i.training.alignment import Alignment


class Inputs(NamedTuple):
    """The network's inputs of a micro-batch, on the device. latents and noise (N, C, H, W), t (N,).

    features: the image encoder's features of the clean images (N, rows, columns, D), with alignment only.
    """

    latents: Tensor
    conditioning: Conditioning
    t: Tensor
    noise: Tensor
    features: Tensor | None = None


@dataclass(frozen=True)
class InputMaker:
    """Encodes micro-batches. Each random draw is a function of the seed and the sample's position."""

    config: Config
    device: torch.device
    autoencoder: Autoencoder
    conditioner: Conditioner
    diffusion: Process
    alignment: Alignment | None = None

    def __call__(self, batch: Batch) -> Inputs:
        """The inputs of the network and of the loss for a micro-batch in training."""
        seed, position = self.config.seed, batch.positions.to(self.device, non_blocking=True)
        latents = self.latents(batch, position)
        dropped = randomness.uniform(seed, "drop", position) < self.config.model.dropout_prob
        conditioning = self.conditioner.of_batch(batch)
        conditioning = self.conditioner.add_noise(conditioning, self.config.text_encoder.noise, seed, position)
        conditioning = self.conditioner.drop(conditioning, dropped)
        t = self.diffusion.draw_timesteps(seed, position)
        noise = randomness.normal(seed, "noise", position, latents.shape[1:])
        return Inputs(latents, conditioning, t, noise, self._features(batch))

    def latents(self, batch: Batch, position: Tensor) -> Tensor:
        """Latents (N, C, H, W), whose random draws depend on ``position`` (N,) int64 on the device."""
        return self.autoencoder.of_batch(batch, position, self.config.seed)

    def _features(self, batch: Batch) -> Tensor | None:
        if self.alignment is None:
            return None
        assert batch.images is not None
        return self.alignment.encoder.encode(batch.images)
