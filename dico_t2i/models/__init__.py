"""The networks and their sizes."""

from dico_t2i.config import DIT_VARIANTS, UVIT_VARIANTS, VARIANTS, DiCoConfig, NetworkConfig
from dico_t2i.models.adapter import adapter_origin, add_adapter, merge_adapter, read_adapter, write_adapter
from dico_t2i.models.build import build_network
from dico_t2i.models.cost import count_macs, count_parameters, count_scan_macs, count_trained, trained_sizes
from dico_t2i.models.dico import STAGES, DiCo
from dico_t2i.models.network import Network

__all__ = [
    "DIT_VARIANTS",
    "STAGES",
    "UVIT_VARIANTS",
    "VARIANTS",
    "DiCo",
    "DiCoConfig",
    "Network",
    "NetworkConfig",
    "adapter_origin",
    "add_adapter",
    "build_network",
    "count_macs",
    "count_parameters",
    "count_scan_macs",
    "count_trained",
    "merge_adapter",
    "read_adapter",
    "trained_sizes",
    "write_adapter",
]
