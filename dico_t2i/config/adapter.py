"""Config section for low-rank adapters (LoRA)."""

from __future__ import annotations

from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from dico_t2i.config.base import Positive, PositiveFloat, Section
from dico_t2i.config.yaml12 import Text


class AdapterConfig(Section):
    """A low-rank adapter (LoRA) of a DiCo, which is trained while the weights that it is added to stay as they are."""

    # The weights that the adapter is added to: a run, one of its checkpoints, or an exported folder.
    from_: Text = Field(alias="from")
    # For a run or a checkpoint: weight, or an average such as ema_0.9999; with none it is the first average.
    weights: Text | None = None
    rank: Positive = 16  # The rank of the matrices that are added to the weights of each layer.
    # What is added to a weight is alpha / rank times the product of its two matrices.
    alpha: PositiveFloat = 16.0
    # Patterns of the linear layers that get an adapter. The default is all pointwise layers of the blocks, except for
    # the modulations, and all layers of the text.
    targets: tuple[Text, ...] = ("stages.*.conv.*", "stages.*.ffn.*", "*text*")

    @model_serializer(mode="wrap")
    def _from(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key.rstrip("_"): value for key, value in dump(self).items()}

    @property
    def factor(self) -> float:
        """Return the factor of the product of a layer's two matrices."""
        return self.alpha / self.rank
