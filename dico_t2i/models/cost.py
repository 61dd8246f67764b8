"""Parameters and multiply-accumulates of a network, counted without allocating it."""

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from dico_t2i.config import NetworkConfig
from dico_t2i.models.build import build_network


def count_parameters(config: NetworkConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_network(config).parameters())


def count_macs(config: NetworkConfig, input_shape: Sequence[int]) -> int:
    """Multiply-accumulates of convolutions, matrix products and attention of one pass.

    input_shape (N, C, H, W). What the field often calls FLOPs; elementwise work is not counted.
    """
    with torch.device("meta"):
        model, x = build_network(config), torch.empty(*input_shape)
        batch = len(x)
        pooled = torch.empty(batch, config.pooled_dim) if config.pooled_text else None
        if config.condition == "class":
            cond = torch.empty(batch, dtype=torch.int64)
        else:
            cond = torch.empty(batch, config.text_tokens, config.text_dim)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, torch.empty(batch), cond, pooled)
    return counter.get_total_flops() // 2
