"""Predicts how the speed of a config grows with the number of nodes, and what limits it first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dico_t2i.config import Config
from dico_t2i.plan.plan import Estimate, estimate

_NO_LIMIT = {"link_gb_s": 1e6, "network_gb_s": 1e6}
_NO_DELAY = {"latency_us": 1e-3, "link_hop_us": 1e-3, "network_hop_us": 1e-3}
_LEAST = 0.005  # of a step: a resource that costs less is no bottleneck
_ENOUGH = 0.9  # of the efficiency that the smallest batch for it is searched for


@dataclass(frozen=True)
class Scale:
    """A config on some number of nodes.

    efficiency: images per second and device, relative to the first number of nodes. costs: seconds of a step that would
    be saved if a resource had no limits. enough: the smallest global batch with an efficiency of 0.9 that is a power of
    two times the number of ranks; None if even passes without number do not reach it.
    """

    nodes: int
    ranks: int
    batch: int
    estimate: Estimate
    efficiency: float
    costs: Mapping[str, float]
    enough: int | None

    @property
    def bottleneck(self) -> str:
        """The resource that costs most, unless it costs next to nothing."""
        name = max(self.costs, key=lambda key: self.costs[key])
        return name if self.costs[name] > _LEAST * self.estimate.step_s else "computing"


def sweep(config: Config, nodes: Sequence[int], per_rank: int | None = None) -> list[Scale]:
    """Predict the config on each number of nodes.

    per_rank: samples of each rank and step, the same for all (weak scaling); None for the config's global batch divided
    among the ranks. Numbers of ranks that do not divide that are left out.
    """
    configs = {count: _on(config, count, per_rank) for count in nodes}
    found = {count: (own, estimate(own)) for count, own in configs.items() if own is not None}
    if not found:
        raise ValueError("--sweep-nodes: train.global_batch is not divisible by any of these numbers of ranks")
    best = _rate(*next(iter(found.values())))
    return [
        Scale(
            nodes=count,
            ranks=own.cluster.ranks,
            batch=own.train.global_batch,
            estimate=at,
            efficiency=_rate(own, at) / best,
            costs={name: at.step_s - estimate(_with_hardware(own, better)).step_s for name, better in _limits(own)},
            enough=_enough(config, count, best),
        )
        for count, (own, at) in found.items()
    ]


def _on(config: Config, nodes: int, per_rank: int | None) -> Config | None:
    """The config on this many nodes, with streams for them; None if its batch does not divide among them."""
    cluster = config.cluster.model_copy(update={"nodes": nodes})
    ranks = cluster.ranks
    batch = config.train.global_batch if per_rank is None else per_rank * ranks
    if batch % ranks:
        return None
    changes = {
        "cluster": cluster,
        "train": config.train.model_copy(update={"global_batch": batch}),
        "data": config.data.model_copy(update={"streams": ranks}),
    }
    return config.model_copy(update=changes)


def _rate(config: Config, at: Estimate) -> float:
    """Images per second of one rank."""
    return at.images_per_s / config.cluster.ranks


def _limits(config: Config) -> list[tuple[str, Mapping[str, float]]]:
    """What limits communication, and the hardware without it.

    That is the slower of the links in a node and the network between nodes, and the delays of collectives.
    """
    cluster = config.cluster
    linked = cluster.rate == 1e9 * cluster.hardware.link_gb_s
    return [("links" if linked else "network", _NO_LIMIT), ("delays", _NO_DELAY)]


def _with_hardware(config: Config, changes: Mapping[str, float]) -> Config:
    hardware = config.cluster.hardware.model_copy(update=dict(changes))
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"hardware": hardware})})


def _enough(config: Config, nodes: int, best: float) -> int | None:
    for power in range(11):
        own = _on(config, nodes, 1 << power)
        if own is not None and _rate(own, estimate(own)) >= _ENOUGH * best:
            return own.train.global_batch
    return None
