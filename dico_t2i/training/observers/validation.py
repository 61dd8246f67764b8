"""Computes the loss of the averaged weights on held-out data at fixed timesteps.

All validations of a run use the same samples, captions, timesteps and noise, so that only the network differs between
them. Timesteps are the middles of equal bands; sample i is evaluated in band i mod bands.
"""

from collections.abc import Iterator
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dico_t2i import randomness
from dico_t2i.config import Config, ConfigError
from dico_t2i.data.batches import Batch
from dico_t2i.data.checks import check_data
from dico_t2i.data.loader import Share, make_loader
from dico_t2i.data.sources import load_data, make_order
from dico_t2i.training.inputs import InputMaker
from dico_t2i.training.observers.groups import group_sums
from dico_t2i.training.ranks.distributed import World


class Validation:
    """Validates on the held-out data of a config.

    inputs: encodes the batches in the same way as in training. Raises ConfigError or DataError if the data do not fit
    the config.
    """

    def __init__(self, config: Config, world: World, micro_batch: int, inputs: InputMaker) -> None:
        assert config.validation is not None
        self.config, self.settings, self.world = config, config.validation, world
        self.micro_batch, self.inputs = micro_batch, inputs
        held_out = {"path": self.settings.path, "mixture": (), "flip": False, "workers": 0}
        self.data, batch = config.data.model_copy(update=held_out), config.train.global_batch
        self.index = load_data(self.data, check=world.is_main)
        check_data(config.model_copy(update={"data": self.data, "alignment": None}), self.index)
        self.order = make_order(self.data, self.index, config.seed, batch)
        self.batches = -(-self.settings.samples // batch)
        if self.batches * batch > self.order.epoch_length:
            raise ConfigError(
                f"validation.samples: {self.settings.samples}, rounded up to batches of {batch}, is too many:"
                f" {self.index.location} has only {len(self.index)} samples; ask for fewer, or hold out more"
            )
        self.timesteps = band_middles(config.diffusion.steps, self.settings.bands)

    @torch.no_grad()
    def run(self, model: nn.Module) -> dict[str, float]:
        """The mean losses over all samples and over those of each band; collective.

        Returns "val_loss", its parts "val_mse" and "val_vb", and "val_loss_t<timestep>" for each band.
        """
        sums = torch.zeros(len(self.timesteps), 4, dtype=torch.float64, device=self.world.device)
        for batch in islice(self._loader(), self.batches * self._passes):
            position = batch.positions.to(self.world.device)
            band = position % len(self.timesteps)
            losses = self._losses(model, batch, position, self.timesteps.to(position.device)[band])
            parts = [losses.get(key, torch.zeros_like(losses["loss"])) for key in ("loss", "mse", "vb")]
            values = torch.stack([*parts, torch.ones_like(parts[0])], dim=1).double()
            sums += group_sums(values, band, len(self.timesteps))
        dist.all_reduce(sums)
        loss, mse, vb, _ = (sums.sum(0) / sums[:, 3].sum()).tolist()
        by_band = (sums[:, 0] / sums[:, 3]).tolist()
        bands = {f"val_loss_t{t}": value for t, value in zip(self.timesteps.tolist(), by_band, strict=True)}
        return {"val_loss": loss, "val_mse": mse, "val_vb": vb, **bands}

    def _losses(self, model: nn.Module, batch: Batch, position: Tensor, t: Tensor) -> dict[str, Tensor]:
        latents = self.inputs.latents(batch, position)
        conditioning = self.inputs.conditioner.of_batch(batch)
        noise = randomness.normal(self.config.seed, "validation noise", position, latents.shape[1:])
        return self.inputs.diffusion.training_losses(lambda x, t: model(x, t, **conditioning), latents, t, noise)

    @property
    def _passes(self) -> int:
        """The number of micro-batches of a rank in a batch."""
        return self.config.train.global_batch // (self.world.size * self.micro_batch)

    def _loader(self) -> Iterator[Batch]:
        return iter(
            make_loader(
                self.data,
                self.index,
                self.order,
                Share(self.config.train.global_batch, self.micro_batch, self.world.rank, self.world.size),
                self.inputs.conditioner.wanted,
                seed=self.config.seed,
            )
        )


def band_middles(steps: int, bands: int) -> Tensor:
    """The middle timestep of each of ``bands`` equal bands of range(steps), int64 (bands,)."""
    return torch.tensor([(2 * band + 1) * steps // (2 * bands) for band in range(bands)])
