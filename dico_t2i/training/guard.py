"""Skips steps that would damage the weights, and detects when a run has to return to a checkpoint."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dico_t2i.config import GuardConfig
from dico_t2i.runs.log import append

_SETTLED = 50  # good steps before the mean gradient norm is used to detect spikes
_MEMORY = 0.98  # decay of the running mean


@dataclass
class GuardState:
    """The state of the guard that is saved with a checkpoint."""

    norm_mean: float = 0.0
    good_steps: int = 0
    rollbacks: int = 0


class Guard:
    """Judges gradient norms. All ranks see the same norms and therefore make the same decisions."""

    def __init__(self, config: GuardConfig, quarantine: Path | None) -> None:
        """quarantine: the file that lists skipped batches; None on ranks other than 0."""
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
        """Whether so many steps in a row were skipped that the run should not continue."""
        return self.skipped_in_row >= self.config.max_skipped

    def hear(self, step: int, position: int, batch: int, norm: Tensor, skipped: Tensor) -> None:
        """Register a step, whose norm may not be computed yet. On a GPU it is judged one step later, to avoid waiting.

        If spikes are skipped, the next limit needs this norm, so the step is judged at once. norm and skipped are
        zero-dimensional tensors.
        """
        self._heard.append(((step, position, batch), _on_its_way(torch.stack((norm.double(), skipped.double())))))
        late = norm.is_cuda and self.config.spike == 0
        self.settle(keep=1 if late else 0)

    def settle(self, keep: int = 0) -> None:
        """Judge all registered steps except the last ``keep``."""
        while len(self._heard) > keep:
            where, read = self._heard.popleft()
            norm, skipped = read()
            self.judge(*where, norm, bool(skipped))

    def judge(self, step: int, position: int, batch: int, norm: float, skipped: bool) -> None:
        """Judge a step on the samples [position, position + batch)."""
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
        """Load the state of a checkpoint; values that it lacks keep their defaults."""
        self.state = GuardState(**{**asdict(GuardState()), **saved})

    def forget_norms(self) -> None:
        """Start the mean of the norms again, as a stage does."""
        self.state = GuardState(rollbacks=self.state.rollbacks)

    def _list(self, line: dict[str, object]) -> None:
        if self.quarantine is not None:
            append(self.quarantine, line)


def _on_its_way(values: Tensor) -> Callable[[], list[float]]:
    """Start a copy from the device, and return a function that waits only for this copy and returns the values."""
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
