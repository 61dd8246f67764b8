"""Parameters and multiply-accumulates of a network, counted without allocating it."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dico_t2i.config import AdapterConfig, NetworkConfig
from dico_t2i.models.adapter import add_adapter
from dico_t2i.models.build import build_network
from dico_t2i.ops import SCANS, flop_formulas


def count_parameters(config: NetworkConfig) -> int:
    """The number of parameters of the network that a config describes."""
    return sum(parameter.size for parameter in _parameters(config))


def count_trained(config: NetworkConfig, adapter: AdapterConfig | None, matrices: bool = False) -> int:
    """The number of parameters that are trained, which are all without an adapter.

    matrices: count only the weights of linear layers, which Muon updates.
    """
    return sum(trained_sizes(config, adapter, matrices))


def trained_sizes(config: NetworkConfig, adapter: AdapterConfig | None, matrices: bool = False) -> tuple[int, ...]:
    """The number of elements of each parameter that is trained; with ``matrices``, of each that Muon updates."""
    return tuple(p.size for p in _parameters(config, adapter) if p.trained and (p.linear or not matrices))


class _Parameter(NamedTuple):
    size: int
    trained: bool
    linear: bool  # the weight of a linear layer


def _parameters(config: NetworkConfig, adapter: AdapterConfig | None = None) -> tuple[_Parameter, ...]:
    return _built_parameters(config.model_copy(update={"checkpoint_stages": ()}), adapter)


@cache
def _built_parameters(config: NetworkConfig, adapter: AdapterConfig | None) -> tuple[_Parameter, ...]:
    with torch.device("meta"):
        network = build_network(config)
        if adapter:
            add_adapter(network, adapter)
    linear = {layer.weight for layer in network.modules() if isinstance(layer, nn.Linear)}
    return tuple(_Parameter(p.numel(), p.requires_grad, p in linear) for p in network.parameters())


def count_macs(config: NetworkConfig, input_shape: Sequence[int]) -> int:
    """The multiply-accumulates of the convolutions, matrix products, attention and scans in one forward pass.

    input_shape is (N, C, H, W). Papers often call this number FLOPs. Elementwise operations are not counted.
    """
    return sum(_macs_by_operator(config, tuple(input_shape)).values())


def count_scan_macs(config: NetworkConfig, input_shape: Sequence[int]) -> int:
    """The part of ``count_macs`` that belongs to recurrences along tokens, which papers leave out."""
    macs = _macs_by_operator(config, tuple(input_shape))
    return sum(macs.get(operator, 0) for operator in SCANS)


@cache
def _macs_by_operator(config: NetworkConfig, input_shape: tuple[int, ...]) -> dict[Any, int]:
    from torch.utils.flop_counter import FlopCounterMode

    flop_formulas()
    with torch.device("meta"):
        model, inputs = build_network(config), example_inputs(config, input_shape)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(*inputs)
    return {operator: flops // 2 for operator, flops in counter.get_flop_counts()["Global"].items()}


def example_inputs(
    config: NetworkConfig, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Example inputs x of this shape (N, C, H, W), t, cond and pooled, on the current device.

    Only their shapes and dtypes matter; their values are arbitrary. dtype is that of the text; x has the default dtype.
    """
    batch = shape[0]
    x, t = torch.empty(*shape), torch.zeros(batch, dtype=torch.int64)
    cond = torch.zeros(batch, dtype=torch.int64)
    if config.condition == "text":
        cond = torch.empty(batch, config.text_tokens, config.text_dim, dtype=dtype)
    pooled = torch.empty(batch, config.pooled_dim, dtype=dtype) if config.pooled_text else None
    return x, t, cond, pooled
