"""Steps that would spoil the weights: skipped one by one, and a way back when they don't end."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dico_t2i.config import GuardConfig
from dico_t2i.runs.log import append

_SETTLED = 50  # good steps before the mean gradient norm can tell a spike
_MEMORY = 0.98  # of the running mean


@dataclass
class GuardState:
    """What of the guard is saved with a checkpoint."""

    norm_mean: float = 0.0
    good_steps: int = 0
    rollbacks: int = 0


class Guard:
    """Judges gradient norms. Every rank sees the same norms, and so decides the same."""

    def __init__(self, config: GuardConfig, quarantine: Path | None) -> None:
        """quarantine: where skipped batches are listed; None on ranks other than 0."""
        self.config, self.quarantine = config, quarantine
        self.state = GuardState()
        self.skipped_in_row = 0
        self._heard: deque[tuple[tuple[int, int, int], Callable[[], list[float]]]] = deque()

    @property
    def limit(self) -> float:
        """The largest gradient norm to accept."""
        settled = self.config.spike > 0 and self.state.good_steps >= _SETTLED
        return self.config.spike * self.state.norm_mean if settled else math.inf

    @property
    def lost(self) -> bool:
        """Whether so many steps in a row were skipped that going on is no use."""
        return self.skipped_in_row >= self.config.max_skipped

    def hear(self, step: int, position: int, batch: int, norm: Tensor, skipped: Tensor) -> None:
        """Take note of a step while its norm may still be in the making: on a GPU one step later, so that none waits.

        Where spikes are looked for the next limit needs this norm, and it is waited for. norm, skipped: no dimension.
        """
        self._heard.append(((step, position, batch), _on_its_way(torch.stack((norm.double(), skipped.double())))))
        late = norm.is_cuda and self.config.spike == 0
        self.settle(keep=1 if late else 0)

    def settle(self, keep: int = 0) -> None:
        """Judge all steps heard of but the last ``keep``."""
        while len(self._heard) > keep:
            where, read = self._heard.popleft()
            norm, skipped = read()
            self.judge(*where, norm, bool(skipped))

    def judge(self, step: int, position: int, batch: int, norm: float, skipped: bool) -> None:
        """Take note of a step on samples [position, position + batch)."""
        if skipped:
            self.skipped_in_row += 1
            self._list({"step": step, "positions": [position, position + batch], "grad_norm": str(norm)})
            return
        self.skipped_in_row = 0
        state = self.state
        memory = _MEMORY if state.good_steps else 0.0
        state.norm_mean = memory * state.norm_mean + (1 - memory) * norm
        state.good_steps += 1

    def restore(self, saved: dict[str, float]) -> None:
        """Take the state a checkpoint holds; what it lacks stays at its start."""
        self.state = GuardState(**{**asdict(GuardState()), **saved})

    def _list(self, line: dict[str, object]) -> None:
        if self.quarantine is not None:
            append(self.quarantine, line)


def _on_its_way(values: Tensor) -> Callable[[], list[float]]:
    """Start to copy from the device; the result waits for the copy, and for nothing that came after it."""
    if not values.is_cuda:
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read
