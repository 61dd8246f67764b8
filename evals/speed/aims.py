"""The goals of DiCo-XL on GPUs that are computed, not measured: of its kernels, its steps and its memory."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from rich.table import Table

from evals import gpu_code
from evals.speed.machine_code import MACHINES
from evals.speed.measure import SHAPES
from evals.speed.predict import Step, as_markdown, total

GPU, BATCH = "H200", 256
COLUMNS = ("DiCo-XL", "computed", "goal", "reached")
_CONVOLUTIONS = ("depthwise forward", "depthwise backward", "text forward")


class Aim(NamedTuple):
    """A number that has to be at most, or at least, as large as its goal."""

    what: str
    value: float
    goal: float
    at_least: bool = False

    @property
    def reached(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def cells(self) -> tuple[str, ...]:
        """Those of COLUMNS."""
        goal = f"{'at least' if self.at_least else 'at most'} {self.goal:g}"
        return self.what, f"{self.value:.3g}", goal, "yes" if self.reached else "no"


def aims(by_class: Step, by_text: Step) -> Iterator[Aim]:
    """From the training steps of DiCo-XL at batch 256, and from the kernels compiled at its shapes."""
    found = list(gpu_code.rows(_CONVOLUTIONS, SHAPES[3:], BATCH, torch.bfloat16, MACHINES[GPU]))
    for kernel in ("depthwise_forward", "depthwise_slope", "depthwise_backward"):
        ratio = max(row.ratio for row in found if row.kernel == kernel)
        yield Aim(f"{kernel}: issue over bytes", ratio, 1.2)
    text = [row for row in found if row.kernel == "text_forward"]
    yield Aim("text_forward: stack, bytes", max(row.stack for row in text), 0)
    yield Aim("text_forward: multiply-adds, % of its loop", 100 * min(row.useful for row in text), 65, at_least=True)
    seconds = [total(step.rows).predicted_s[GPU] for step in (by_class, by_text)]
    yield Aim(f"class, batch {BATCH}: step on an {GPU}, predicted, ms", 1e3 * seconds[0], 300)
    yield Aim("text step over class step, predicted", seconds[1] / seconds[0], 1.2)
    yield Aim("class: kept for the backward pass, MB an image", by_class.kept / 1e6, 293)
    yield Aim("text: kept for the backward pass, MB an image", by_text.kept / 1e6, 350)


def table(found: Sequence[Aim]) -> Table:
    made = Table(*COLUMNS, title="Goals that are computed; nothing here is a timing")
    for aim in found:
        made.add_row(*aim.cells())
    return made


def markdown(found: Sequence[Aim]) -> str:
    return as_markdown([COLUMNS, *(aim.cells() for aim in found)])
