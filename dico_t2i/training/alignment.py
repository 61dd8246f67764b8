"""REPA: aligns features of the network on noisy images with those of a frozen encoder on the clean images.

The loss is the mean over patches of -cos(projector(features), the encoder's features) (Yu et al. 2024). The features of
a U-shape differ in size from the encoder's grid. They are projected first and then resampled, as in U-REPA (Tian et al.
2025), which found that the middle stage of U-Nets is the best one to align.

The projector is a child of the network with the name PROJECTOR, so that the engine trains, shards, averages and saves
it with the network. Code that reads the network from a checkpoint leaves it out.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dico_t2i.config import Config, ConfigError, PatchConfig
from dico_t2i.diffusion.process import full_precision
from dico_t2i.encoders import load_vision_encoder
from dico_t2i.models import Network, build_network
from dico_t2i.models.cost import example_inputs
from dico_t2i.runs.checkpoint import PROJECTOR


class Alignment:
    """Holds the image encoder, and the projected features of the last forward pass.

    Raises ConfigError if the network has no such block, and MissingModelError if the encoder cannot be found.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        assert config.alignment is not None
        self.settings = config.alignment
        self.width = feature_width(config, self.settings.block)
        self.side = token_side(config)
        self.encoder = load_vision_encoder(self.settings.encoder, device, dtype)
        self._features: Any = None
        self._projected: Tensor | None = None

    def attach(self, network: nn.Module) -> None:
        """Add the projector to the network; each forward pass then stores the projected features here."""
        projector = _projector(self.width, self.settings.hidden, self.encoder.width)
        network.add_module(PROJECTOR, projector)

        @torch.compiler.disable
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._features = output

        def project(*_: Any) -> None:
            self._projected, self._features = projector(as_map(self._features, self.side)), None

        network.get_submodule(self.settings.block).register_forward_hook(keep)
        network.register_forward_hook(project)

    def added(self, losses: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """Add "alignment" to the losses (N,) of the last forward pass; "loss" then includes it.

        target: the encoder's features of the clean images, (N, rows, columns, D).
        """
        assert self._projected is not None
        alignment, self._projected = alignment_loss(self._projected, target), None
        return {**losses, "loss": losses["loss"] + self.settings.weight * alignment, "alignment": alignment}


def alignment_loss(projected: Tensor, target: Tensor) -> Tensor:
    """The mean over patches of -cos, (N,) float32, or float64 for float64 inputs.

    projected: (N, h, w, D), resampled to the target's grid. target: (N, rows, columns, D).
    """
    projected = resample(full_precision(projected), target.shape[1], target.shape[2])
    return -F.cosine_similarity(projected, full_precision(target), dim=-1).mean(dim=(1, 2))


def resample(x: Tensor, rows: int, columns: int) -> Tensor:
    """Resample (N, h, w, D) to (N, rows, columns, D): bilinear, with antialiasing where it shrinks.

    It multiplies by small matrices, so that gradients are deterministic on GPUs, too.
    """
    if x.shape[1:3] == (rows, columns):
        return x
    down, across = (_weights(*sizes, x.dtype, x.device) for sizes in ((x.shape[1], rows), (x.shape[2], columns)))
    return torch.einsum("ph,qw,nhwd->npqd", down, across, x)


@cache
def _weights(source: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weight of each source in each target, (target, source).

    It is computed in float64 and kept: copying it to a GPU for each micro-batch would make the host wait.
    """
    units = torch.eye(source, dtype=torch.float64)[None, None]
    return F.interpolate(units, size=(source, target), mode="bilinear", antialias=True)[0, 0].T.to(device, dtype)


def token_side(config: Config) -> int:
    """The number of rows, and of columns, of a transformer's image tokens, or of the input of other networks."""
    patch = config.model.patch_size if isinstance(config.model, PatchConfig) else 1
    return config.latent_size // patch


def as_map(features: Any, side: int) -> Tensor:
    """The output of a block as a map (N, h, w, C).

    The output is such a map, or tokens (N, T, C), or a tuple whose last entry is one of these. The last side * side
    tokens are those of the image.
    """
    x: Tensor = features[-1] if isinstance(features, tuple) else features
    return x if x.ndim == 4 else x[:, -side * side :].unflatten(1, (side, side))


def feature_width(config: Config, block: str) -> int:
    """The channels of the block's features. Raises ConfigError if there is no such block, or it returns no map."""
    seen: list[Tensor] = []
    with torch.device("meta"), torch.no_grad():
        network = build_network(config.model)
        try:
            module = network.get_submodule(block)
        except AttributeError as error:
            raise ConfigError(
                f"alignment.block: the network has no {block} ({error}); a block is, for example, {_middle(network)}"
            ) from None
        side = token_side(config)
        module.register_forward_hook(lambda _module, _inputs, output: seen.append(as_map(output, side)))
        try:
            network(*example_inputs(config.model, (1, config.model.in_channels, *[config.latent_size] * 2)))
            return seen[0].shape[3]
        except (AttributeError, IndexError, RuntimeError) as error:
            raise ConfigError(
                f"alignment.block: {block} returns no map of features; use a whole block, such as {_middle(network)}"
            ) from error


def _middle(network: Network) -> str:
    """The path of the network's middle block."""
    blocks = list(network.residual_blocks())
    return next(name for name, module in network.named_modules() if module is blocks[len(blocks) // 2])


def _projector(features: int, hidden: int, out: int) -> nn.Sequential:
    """REPA's projector: three linear layers with SiLU between them."""
    return nn.Sequential(
        nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)
    )
