"""Decides which checkpoints are kept, on disk and at a URL."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: the last ones, those of every N-th step, and the one with the lowest loss.

    steps: further steps whose checkpoints are kept: where stages began, and where the learning rate begins to fall.
    """

    last: int
    every_steps: int | None = None
    best: bool = False
    steps: frozenset[int] = frozenset()

    def expired(self, complete: Sequence[int], loss: Callable[[int], float]) -> list[int]:
        """The steps whose checkpoints may be deleted, oldest first.

        complete: the steps of the complete checkpoints, oldest first. loss(step) is the loss of one of them.
        """
        kept = set(complete[-self.last :]) | self.steps
        if self.every_steps:
            kept |= {step for step in complete if step % self.every_steps == 0}
        if self.best and complete:
            kept.add(min(complete, key=loss))
        return [step for step in complete if step not in kept]
