"""Records attention probabilities, layer by layer, as a network computes them; its output stays unchanged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Receives a layer's name and its attention (queries, keys), for one head of one sample after the other.
Sink = Callable[[str, Iterable[Tensor]], None]


@contextmanager
def recording(layers: Mapping[str, nn.Module], queries: int, sink: Sink) -> Iterator[None]:
    """Pass the attention of the last ``queries`` queries to ``sink`` whenever a layer calls torch's attention.

    layers: the modules in whose forward pass attention is recorded. The network's own operator computes its output. The
    probabilities are computed separately from the same queries and keys, one head at a time to limit memory.
    """
    recorder = _Recorder(queries, sink)
    hooks = []
    for name, layer in layers.items():
        hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: recorder.enter(name)))
        hooks.append(layer.register_forward_hook(lambda *_: recorder.enter(None)))
    try:
        with recorder, torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Recorder(TorchFunctionMode):
    def __init__(self, queries: int, sink: Sink) -> None:
        super().__init__()
        self.queries, self.sink = queries, sink
        self.layer: str | None = None

    def enter(self, layer: str | None) -> None:
        self.layer = layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.layer is not None:
            self._record(self.layer, *args, **kwargs)
        return func(*args, **kwargs)

    def _record(
        self,
        layer: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """query, key (N, heads, T, d)."""
        if attn_mask is not None or is_causal or enable_gqa:
            raise ValueError(f"{layer}: this analysis does not support attention with a mask or shared heads")
        heads = zip(query.flatten(0, 1), key.flatten(0, 1), strict=True)
        self.sink(layer, (attention_probabilities(q[-self.queries :], k, scale) for q, k in heads))


def attention_probabilities(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale) of one head, (queries, keys) float32, or float64. scale: by default 1/sqrt(d)."""
    query, key = (x if x.dtype == torch.float64 else x.float() for x in (query, key))
    return (query @ key.T * (scale or 1 / math.sqrt(query.shape[-1]))).softmax(dim=-1)
