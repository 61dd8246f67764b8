"""The network that a config describes."""

from dico_t2i.config import DiCoConfig, DiTConfig, MMDiTConfig, NetworkConfig, PixArtConfig, UViTConfig
from dico_t2i.models.dico import DiCo
from dico_t2i.models.network import Network


def build_network(config: NetworkConfig) -> Network:
    """A fresh network on the current device; peers are imported when they are asked for."""
    match config:
        case DiCoConfig():
            return DiCo(config)
        case DiTConfig():
            from dico_t2i.models.peers.dit import DiT

            return DiT(config)
        case UViTConfig():
            from dico_t2i.models.peers.uvit import UViT

            return UViT(config)
        case PixArtConfig():
            from dico_t2i.models.peers.pixart import PixArt

            return PixArt(config)
        case MMDiTConfig():
            from dico_t2i.models.peers.mmdit import MMDiT

            return MMDiT(config)
    raise TypeError(f"{type(config).__name__} describes no network")
