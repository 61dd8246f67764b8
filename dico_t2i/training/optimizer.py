"""AdamW with exponential moving averages of the weights as part of its state.

Where the optimizer's parameters are ZeRO partitions, so are the averages: nothing is gathered to update or to
save them. They live and stay in fp32, and take a step exactly when the weights do.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dico_t2i.config import OptimizerConfig
from dico_t2i.runs.kinds import MOMENTS, ema_name


class AdamWEMA(torch.optim.AdamW):
    """ema <- ema + (1 - decay) (weight - ema) after each step, from the initial weights, for several decays."""

    def __init__(self, params: Iterable[Tensor], config: OptimizerConfig) -> None:
        super().__init__(
            params,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.decays = config.ema
        self.veto: Callable[[], Tensor] | None = None  # asked before a step: leave everything as it is?
        self.deferred = False  # the answer stays on the device, and nobody waits for it

    @property
    def state_names(self) -> tuple[str, ...]:
        return (*MOMENTS, *map(ema_name, self.decays))

    def materialize(self, weights: Iterable[Tensor], step: int) -> None:
        """Give each weight the state it has after ``step`` steps, with moments 0 and averages at the weight."""
        for weight in weights:
            self.state[weight] = {
                "step": torch.tensor(float(step), device=weight.device),
                **{name: torch.zeros_like(weight) for name in MOMENTS},
                **{ema_name(decay): weight.detach().clone() for decay in self.decays},
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.materialize((w for w in weights if not self.state[w]), step=0)
        skip = self.veto() if self.veto is not None and weights else None
        if not weights or (skip is not None and not self.deferred and skip):
            return
        self.found_inf = skip.float() if skip is not None and self.deferred else None  # torch's kernels heed it
        super().step(closure)
        for decay in self.decays:
            averages = [self.state[w][ema_name(decay)] for w in weights]
            if self.found_inf is None:
                torch._foreach_lerp_(averages, weights, 1 - decay)
                continue
            share = (1 - decay) * (1 - self.found_inf)
            for average, weight in zip(averages, weights, strict=True):
                average.lerp_(weight, share)


def learning_rate(config: OptimizerConfig, step: int, total: int, warmup: int) -> float:
    """The rate of step ``step`` (from 0) of ``total``: linear over ``warmup`` steps, then constant or cosine to 0."""
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(1, total - warmup)
    return config.lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, progress), dtype=torch.float64)).item())
