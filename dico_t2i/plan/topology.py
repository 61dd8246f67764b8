"""How long collectives take on a cluster of nodes: fast links in a node, and a network with one rail for each device.

A large collective goes around a ring of all its devices, in which neighbours are mostly in one node. NCCL builds as
many rings as nodes have rails, so a node sends over all of them. The delays of a message add up along a ring for a
gather or a scatter; an all-reduce of a few bytes goes up and down a tree of nodes.
"""

import math
from dataclasses import dataclass
from typing import Literal

from dico_t2i.config import ClusterConfig

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]


@dataclass(frozen=True)
class Group:
    """Neighbouring ranks that communicate with each other: all, or those of one group of ``train.zero_group``."""

    cluster: ClusterConfig
    ranks: int

    @property
    def nodes(self) -> int:
        return math.ceil(self.ranks / self.cluster.ranks_per_node)

    @property
    def rate(self) -> float:
        """Bytes per second that each device sends around a ring, over the slowest link that is used."""
        hardware = self.cluster.hardware
        link = 1e9 * hardware.link_gb_s
        devices = min(self.ranks, self.cluster.ranks_per_node)
        return link if self.nodes == 1 else min(link, 1e9 * hardware.network_gb_s * devices)

    def sent(self, kind: Kind, size: float) -> float:
        """The bytes that each rank sends of a tensor of ``size`` bytes; one rank's share is never sent."""
        return (2 if kind == "all_reduce" else 1) * size * (self.ranks - 1) / self.ranks

    def delay(self, kind: Kind) -> float:
        """The seconds of a collective of a few bytes."""
        hardware, nodes = self.cluster.hardware, self.nodes
        if kind == "all_reduce":
            levels = math.ceil(math.log2(nodes)) if nodes > 1 else 0
            inside = min(self.ranks, self.cluster.ranks_per_node) - 1
            hops = 2 * (levels * hardware.network_hop_us + inside * hardware.link_hop_us)
        else:
            between = nodes if nodes > 1 else 0  # a ring leaves each node once, and the last hop is not needed
            hops = max(0, between - 1) * hardware.network_hop_us + (self.ranks - max(1, between)) * hardware.link_hop_us
        return 1e-6 * max(hardware.latency_us, hops)

    def seconds(self, kind: Kind, size: float, collectives: int = 1) -> float:
        """The seconds of sending ``size`` bytes in some number of collectives."""
        return self.sent(kind, size) / self.rate + collectives * self.delay(kind)
