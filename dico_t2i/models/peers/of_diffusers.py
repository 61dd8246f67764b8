"""The base class of the networks that diffusers implements."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from dico_t2i.config.networks import SizedTransformerConfig
from dico_t2i.models.network import Network
from dico_t2i.models.peers.layers import initialize


class OfDiffusers(Network):
    """A transformer of diffusers, initialised as DiT is."""

    def __init__(
        self, config: SizedTransformerConfig, transformer: Any, small: Sequence[str], zero: Sequence[str]
    ) -> None:
        """small, zero: the parts of names that ``initialize`` takes."""
        super().__init__(config)
        self.transformer = transformer
        if config.checkpoint_stages:
            transformer.enable_gradient_checkpointing()
        initialize(transformer, small=small, zero=zero)

    def residual_blocks(self) -> nn.ModuleList:
        return self.transformer.transformer_blocks


def sizes(config: SizedTransformerConfig) -> dict[str, int]:
    """The arguments that all diffusers transformers used here take."""
    return {
        "sample_size": config.latent_size,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
    }
