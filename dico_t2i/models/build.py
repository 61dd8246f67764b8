"""The network that a config describes."""

from importlib import import_module

from dico_t2i.config import DiCoConfig, NetworkConfig
from dico_t2i.models.dico import DiCo
from dico_t2i.models.network import Network


def build_network(config: NetworkConfig) -> Network:
    """A fresh network on the current device.

    A peer is the class NETWORK in the module of ``models.peers`` that is named after its kind. That module is imported
    only when it is needed.
    """
    if isinstance(config, DiCoConfig):
        return DiCo(config)
    network: Network = import_module(f"dico_t2i.models.peers.{config.kind}").NETWORK(config)
    return network
