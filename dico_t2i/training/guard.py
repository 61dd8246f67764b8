"""Steps that would spoil the weights: skipped one by one, and a way back when they don't end."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from dico_t2i.config import GuardConfig

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

    @property
    def limit(self) -> float:
        """The largest gradient norm to accept."""
        settled = self.config.spike > 0 and self.state.good_steps >= _SETTLED
        return self.config.spike * self.state.norm_mean if settled else math.inf

    @property
    def lost(self) -> bool:
        """Whether so many steps in a row were skipped that going on is no use."""
        return self.skipped_in_row >= self.config.max_skipped

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
            with self.quarantine.open("a") as file:
                file.write(json.dumps(line) + "\n")
