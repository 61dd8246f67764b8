"""AdamW with exponential moving averages of the weights in its state.

With ZeRO the averages are partitioned like the parameters, so that updates and saves need no gathering. They are in
fp32, and are updated exactly when the weights are.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dico_t2i.config import OptimizerConfig
from dico_t2i.runs.kinds import MOMENTS, ema_name


class AdamWEMA(torch.optim.AdamW):
    """AdamW that updates ema <- ema + (1 - decay) (weight - ema) after each step, for each of several decays.

    The averages start at the initial weights.
    """

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
        self.veto: Callable[[], Tensor] | None = None  # called before each step: whether to skip it
        self.deferred = False  # keep the answer of veto on the device instead of waiting for it

    @property
    def state_names(self) -> tuple[str, ...]:
        """The names of the tensors in each parameter's state: moments and averages."""
        return (*MOMENTS, *map(ema_name, self.decays))

    def materialize(self, weights: Iterable[Tensor], step: int) -> None:
        """Create the state of each weight for step ``step``: moments of 0, and averages equal to the weight."""
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
        # torch's kernels skip the step if this is 1.
        self.found_inf = skip.float() if skip is not None and self.deferred else None
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
    """The rate of step ``step`` (from 0) of ``total``: linear for ``warmup`` steps, then constant or cosine to 0."""
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(1, total - warmup)
    return config.lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, progress), dtype=torch.float64)).item())
