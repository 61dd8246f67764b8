"""How DeepSpeed sends gradients: the choices that the engine makes, and that the plan computes with."""

import math
from collections.abc import Sequence

from dico_t2i.config import ClusterConfig, TrainConfig

UNDIVIDED = 500_000_000  # most elements that ZeRO stage 0 sends together, a constant of DeepSpeed


def gradient_bytes(train: TrainConfig) -> int:
    """Bytes of each weight in the forward pass, and of its gradient; ZeRO stage 0 trains fp32 weights."""
    return 4 if train.zero_stage == 0 or train.precision == "fp32" else 2


def overlaps(stage: int, ranks: int) -> bool:
    """Whether gradients are sent while the backward pass computes others. Stage 0 sends them after it.

    One rank has nothing to send, and would wait for its GPU at the end of each step for nothing.
    """
    return stage > 0 and ranks > 1


def bucket_size(sizes: Sequence[int], element_bytes: int, cluster: ClusterConfig) -> int:
    """The most elements of gradients that are sent together, where ``sizes`` are those of the trained parameters.

    A bucket is sent when it is full, and the last one when the backward pass has ended. Large buckets leave much to
    send after the pass, and small ones pay the latency often. An all-reduce sends everything twice, so both together
    take n / size * latency + 2 * size * bytes / rate, which is least at the root below. A bucket always has room for
    the largest parameter: at stage 2 DeepSpeed frees the gradient of a larger one before it has been sent.
    """
    whole = sum(sizes)
    best = math.sqrt(whole * 1e-6 * cluster.hardware.latency_us * cluster.rate / (2 * element_bytes))
    return min(whole, max(round(best), *sizes))
