"""The communication of a step: what is sent, how long it takes, and for how much of that time nothing is computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dico_t2i.config import Config
from dico_t2i.models import trained_sizes
from dico_t2i.plan.buffers import UNDIVIDED, bucket_size, gradient_bytes
from dico_t2i.plan.cost import seconds, traced_pass
from dico_t2i.plan.topology import Group
from dico_t2i.plan.trace import Pass

# DeepSpeed's defaults for ZeRO stage 3, in weights: how many it gathers in advance, and how many it keeps from the
# forward pass to the backward pass. The latter is half of its "maximal reuse distance", which counts both passes. A
# parameter that is not larger than SMALL is not divided.
GATHERED = 50_000_000
KEPT = 500_000_000
SMALL = 100_000


@dataclass(frozen=True)
class Communication:
    """The bytes that one device sends in a step, and the seconds this takes over the slowest link used.

    exposed: the part of the seconds in which the device does not compute. Sending is assumed not to slow down
    computing.
    """

    sent: float
    seconds: float
    exposed: float

    @property
    def hidden(self) -> float:
        return self.seconds - self.exposed


def buckets(traced: Pass, trained: int, size: int) -> list[tuple[int, int]]:
    """The buckets of gradients in the order of sending: the operation after which each is sent, and its elements.

    A bucket is sent when the next gradient has no room in it; the last one after the backward pass. trained: the number
    of parameters that are trained. size: the most elements of a bucket.
    """
    sent, held, end = [], 0, len(traced.gradients) - 1
    completed = np.diff(traced.gradients, prepend=0, append=trained).astype(np.int64)
    for at in np.flatnonzero(completed):
        if held and held + completed[at] > size:
            sent.append((min(int(at), end), held))
            held = 0
        held += int(completed[at])
    return [*sent, (end, held)]


def communication(config: Config) -> Communication:
    """The communication of a step, with ring collectives: an all-reduce sends the data twice, a gather or scatter once.

    ZeRO stage 1 reduces gradients once for each step, stages 2 and 3 after each pass. Stages 1 and 2 use an all-reduce
    and then gather the weights. Stage 3 gathers the weights in each forward pass, and again in the backward pass those
    that it did not keep; with ``train.zero_group`` all gathers but the first of a step stay in the group. The few bytes
    of the gradients' norm are left out.
    """
    ranks, stage = config.cluster.ranks, config.train.zero_stage
    if ranks == 1:
        return Communication(0.0, 0.0, 0.0)
    if stage == 0:
        return _undivided(config)
    return _by_modules(config) if stage == 3 else _in_buckets(config)


def _undivided(config: Config) -> Communication:
    """Stage 0: an all-reduce after the last pass."""
    trained = sum(trained_sizes(config.model, config.adapter))
    size, everyone = gradient_bytes(config.train) * trained, _everyone(config)
    time = everyone.seconds("all_reduce", size, -(-trained // UNDIVIDED))
    return Communication(everyone.sent("all_reduce", size), time, time)


def _in_buckets(config: Config) -> Communication:
    """Stages 1 and 2: the buckets of gradients in the backward pass, and the gather of weights after the update."""
    sizes = trained_sizes(config.model, config.adapter)
    everyone, element = _everyone(config), gradient_bytes(config.train)
    trained = element * sum(sizes)
    micro, accumulation = config.batching(config.cluster.ranks)
    passes = accumulation if config.train.zero_stage == 2 else 1
    traced = traced_pass(config, micro)
    sent = buckets(traced, sum(sizes), bucket_size(sizes, element, config.cluster))
    ends = np.cumsum(seconds(config, traced))
    gather = everyone.seconds("all_gather", trained)

    def time(elements: int) -> float:
        return everyone.seconds("all_reduce", element * elements)

    return Communication(
        passes * everyone.sent("all_reduce", trained) + everyone.sent("all_gather", trained),
        passes * sum(time(elements) for _, elements in sent) + gather,
        passes * left_over(ends, sent, time) + gather,
    )


def left_over(ends: np.ndarray, sent: Sequence[tuple[int, int]], time: Callable[[int], float]) -> float:
    """How many seconds later a pass ends because of its buckets, of which DeepSpeed sends one at a time.

    When a bucket is full and the one before it is not sent yet, the device waits, since there are two buffers.

    ends: the time at which each operation would end without waiting. sent: from ``buckets``.
    """
    late, free = 0.0, 0.0
    for at, elements in sent:
        begun = max(ends[at] + late, free)
        late, free = begun - ends[at], begun + time(elements)
    return float(free - ends[-1])


def _by_modules(config: Config) -> Communication:
    """Stage 3: the weights are gathered while the modules before them compute, and the gradients as at stage 2.

    Small parameters are kept by all ranks, which gather them after the update: one by one, but without waiting between
    two of them, so that their delays are assumed to overlap.
    """
    sizes = trained_sizes(config.model, config.adapter)
    everyone, element = _everyone(config), gradient_bytes(config.train)
    own = Group(config.cluster, config.train.zero_group or everyone.ranks)
    micro, passes = config.batching(config.cluster.ranks)
    traced = traced_pass(config, micro)
    spent = seconds(config, traced)
    forward_s, backward_s = spent[: traced.forward].sum(), spent[traced.forward :].sum()
    sent = buckets(traced, sum(sizes), bucket_size(sizes, element, config.cluster))
    large, small = divided(config)
    again = max(0, large - KEPT)

    def gather(group: Group, count: int) -> float:
        return group.seconds("all_gather", element * count, -(-count // GATHERED))

    first, later, regather = gather(everyone, large), gather(own, large), gather(own, again)
    scatter = everyone.seconds("reduce_scatter", element * sum(sizes), len(sent))
    last = everyone.seconds("reduce_scatter", element * sent[-1][1])
    backward = max(last, regather + scatter - backward_s)
    kept = everyone.seconds("all_gather", element * sum(small))
    return Communication(
        _sent_by_modules(everyone, own, passes, *(element * n for n in (large, again, sum(sizes), sum(small)))),
        first + (passes - 1) * later + passes * (regather + scatter) + kept,
        float(_uncovered(first, forward_s) + (passes - 1) * _uncovered(later, forward_s) + passes * backward + kept),
    )


def _sent_by_modules(
    everyone: Group, own: Group, passes: int, large: float, again: float, trained: float, small: float
) -> float:
    """The bytes that each rank sends at stage 3, of data of these sizes."""
    gathers = everyone.sent("all_gather", large + small) + own.sent("all_gather", (passes - 1) * large)
    return gathers + passes * (own.sent("all_gather", again) + everyone.sent("reduce_scatter", trained))


def _uncovered(sending: float, computing: float) -> float:
    return max(0.0, sending - computing)


def divided(config: Config) -> tuple[int, tuple[int, ...]]:
    """The number of weights that stage 3 divides among the ranks, and the sizes of the parameters that it does not."""
    sizes = trained_sizes(config.model, None)
    if config.adapter:
        sizes += trained_sizes(config.model, config.adapter)
    return sum(size for size in sizes if size > SMALL), tuple(size for size in sizes if size <= SMALL)


def _everyone(config: Config) -> Group:
    return Group(config.cluster, config.cluster.ranks)
