"""Config section for low-rank adapters (LoRA)."""

from __future__ import annotations

from dico_t2i.config.base import Positive, PositiveFloat, Section
from dico_t2i.config.yaml12 import Text


class AdapterConfig(Section):
    """A low-rank adapter (LoRA, arXiv 2106.09685), which is trained while the weights of ``init`` stay as they are."""

    rank: Positive = 16  # The rank of the two matrices that are added to each layer.
    # The product of a layer's two matrices is multiplied by alpha / rank.
    alpha: PositiveFloat = 16.0
    # Patterns of the linear layers that get an adapter; with none it is all pointwise layers of the blocks and all
    # layers of the text, but not the modulations.
    targets: tuple[Text, ...] = ()

    @property
    def factor(self) -> float:
        """Return the factor of the product of a layer's two matrices."""
        return self.alpha / self.rank
