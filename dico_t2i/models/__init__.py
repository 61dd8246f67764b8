"""The network and its variants."""

from dico_t2i.config import VARIANTS, DiCoConfig
from dico_t2i.models.cost import count_macs, count_parameters
from dico_t2i.models.dico import STAGES, DiCo

__all__ = ["STAGES", "VARIANTS", "DiCo", "DiCoConfig", "count_macs", "count_parameters"]
