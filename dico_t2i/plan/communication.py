"""The communication of a step: what is sent, how long it takes, and for how much of that time nothing is computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dico_t2i.config import Config
from dico_t2i.models import count_parameters, trained_sizes
from dico_t2i.plan.buffers import UNDIVIDED, bucket_size, gradient_bytes
from dico_t2i.plan.cost import seconds, traced_pass
from dico_t2i.plan.trace import Pass

# DeepSpeed's defaults for ZeRO stage 3, in weights: how many it gathers in advance, and how many it keeps from the
# forward pass to the backward pass. The latter is half of its "maximal reuse distance", which counts both passes.
GATHERED = 50_000_000
KEPT = 500_000_000


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
    """The communication of ring collectives: an all-reduce sends the data twice, a gather or scatter once.

    One rank's share of the data is never sent. ZeRO stage 1 reduces gradients once for each step, stages 2 and 3 after
    each pass. Stages 1 and 2 use an all-reduce and then gather the weights. Stage 3 gathers the weights in each forward
    pass, and again in the backward pass those that it did not keep.
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
    size, time = _sent(config, 2 * trained), _time(config)(2 * trained, -(-trained // UNDIVIDED))
    return Communication(size, time, time)


def _in_buckets(config: Config) -> Communication:
    """Stages 1 and 2: the buckets of gradients in the backward pass, and the gather of weights after the update."""
    sizes = trained_sizes(config.model, config.adapter)
    trained, time = sum(sizes), _time(config)
    micro, accumulation = config.batching(config.cluster.ranks)
    passes = accumulation if config.train.zero_stage == 2 else 1
    traced = traced_pass(config, micro)
    sent = buckets(traced, trained, bucket_size(sizes, gradient_bytes(config.train), config.cluster))
    ends = np.cumsum(seconds(config, traced))
    gather = time(trained, 1)
    return Communication(
        _sent(config, (2 * passes + 1) * trained),
        passes * sum(time(2 * elements, 1) for _, elements in sent) + gather,
        passes * left_over(ends, sent, lambda elements: time(2 * elements, 1)) + gather,
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
    """Stage 3: the weights are gathered while the modules before them compute, and the gradients as at stage 2."""
    sizes = trained_sizes(config.model, config.adapter)
    parameters, trained, time = count_parameters(config.model), sum(sizes), _time(config)
    micro, passes = config.batching(config.cluster.ranks)
    traced = traced_pass(config, micro)
    spent = seconds(config, traced)
    forward_s, backward_s = spent[: traced.forward].sum(), spent[traced.forward :].sum()
    sent = buckets(traced, trained, bucket_size(sizes, gradient_bytes(config.train), config.cluster))
    again = max(0, parameters - KEPT)
    gather, regather = (time(count, -(-count // GATHERED)) for count in (parameters, again))
    scatter, last = time(trained, len(sent)), time(sent[-1][1], 1)
    exposed = max(0.0, gather - forward_s) + max(last, regather + scatter - backward_s)
    return Communication(
        _sent(config, passes * (trained + parameters + again)),
        passes * (gather + regather + scatter),
        passes * float(exposed),
    )


def _sent(config: Config, elements: float) -> float:
    """The bytes that each rank sends of data with this number of elements, divided over all ranks."""
    ranks = config.cluster.ranks
    return elements * gradient_bytes(config.train) * (ranks - 1) / ranks


def _time(config: Config) -> Callable[[float, int], float]:
    """A function from elements and a number of collectives to the seconds of sending them."""

    def time(elements: float, collectives: int) -> float:
        return _sent(config, elements) / config.cluster.rate + 1e-6 * config.cluster.hardware.latency_us * collectives

    return time
