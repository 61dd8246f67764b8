"""Parameters and multiply-accumulates of a network, counted without allocating it."""

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from dico_t2i.config import DiCoConfig
from dico_t2i.models.dico import DiCo


def count_parameters(config: DiCoConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in DiCo(config).parameters())


def count_macs(config: DiCoConfig, input_shape: Sequence[int]) -> int:
    """Multiply-accumulates of convolutions, matrix products and attention of one pass.

    input_shape (N, C, H, W). What the field often calls FLOPs; elementwise work is not counted.
    """
    with torch.device("meta"):
        model, x = DiCo(config), torch.empty(*input_shape)
        batch = len(x)
        pooled = torch.empty(batch, config.pooled_dim) if config.pooled_text else None
        if config.condition == "class":
            cond = torch.empty(batch, dtype=torch.int64)
        else:
            cond = torch.empty(batch, config.text_tokens, config.text_dim)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, torch.empty(batch), cond, pooled)
    return counter.get_total_flops() // 2
