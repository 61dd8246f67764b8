"""Where each stage of a run begins and ends. A run without stages is one stage without a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dico_t2i.config.base import ConfigError
from dico_t2i.config.tree import Config


@dataclass(frozen=True)
class RunStage:
    """A stage of a run. config: its own. first_step and first_position: the run's steps and samples before it.

    decay: in how many of its last steps the learning rate falls, with schedule: wsd.
    """

    number: int
    name: str
    config: Config
    steps: int
    first_step: int = 0
    first_position: int = 0
    later_steps: int = 0  # of all stages after it
    decay: int = 0

    @property
    def last_step(self) -> int:
        """The run's step at which the stage ends."""
        return self.first_step + self.steps

    @property
    def decay_from(self) -> int | None:
        """The run's step at which the stage's learning rate begins to fall, if it does."""
        return max(self.first_step, self.last_step - self.decay) if self.decay else None

    @property
    def run_steps(self) -> int:
        """The run's step at which its last stage ends."""
        return self.last_step + self.later_steps

    @property
    def record(self) -> dict[str, Any]:
        """What a checkpoint remembers, so that a resume begins in this stage; empty for a run without stages."""
        where = {"name": self.name, "first_step": self.first_step, "first_position": self.first_position}
        return where if self.name else {}

    def at(self, step: int, position: int) -> RunStage:
        """This stage, beginning at a step and position of the run."""
        return replace(self, first_step=step, first_position=position)


def plan_stages(config: Config, samples: Sequence[int]) -> list[RunStage]:
    """The stages of a run from its beginning. samples: the size of each stage's data, for durations in epochs."""
    stages: list[RunStage] = []
    step = position = 0
    names = [stage.name for stage in config.stages] or [""]
    for number, (name, own, size) in enumerate(zip(names, config.stage_configs, samples, strict=True)):
        steps = own.train.duration.in_steps(own.train.global_batch, size)
        assert steps is not None  # the config refuses minutes
        fall = own.optimizer.decay
        decay = (fall.in_steps(own.train.global_batch, size) or 0) if fall else 0
        stages.append(RunStage(number, name, own, steps, step, position, decay=decay))
        step, position = step + steps, position + steps * own.train.global_batch
    return [replace(stage, later_steps=step - stage.last_step) for stage in stages]


def next_stage(
    stages: Sequence[RunStage], step: int, position: int, record: Mapping[str, Any], begin: str | None = None
) -> RunStage:
    """The stage that trains the run's next step; the last one if the run has ended.

    step, position: what the run has reached. record: that of the stage in which it reached them; empty for none.
    begin: the name of the first stage to train, which leaves out those before it. Where a stage began stays as it was
    recorded, so that a change of an earlier stage's duration has no effect. Raises ConfigError for an unknown stage.
    """
    stage = stages[0]
    if record:
        stage = _named(stages, record["name"], "this run is in a stage").at(
            record["first_step"], record["first_position"]
        )
    if begin is not None:
        wanted = _named(stages, begin, "--stage")
        if wanted.number > stage.number:
            stage = wanted.at(step, position)
    while step >= stage.last_step and stage.number + 1 < len(stages):
        stage = stages[stage.number + 1].at(step, position)
    return stage


def _named(stages: Sequence[RunStage], name: str, what: str) -> RunStage:
    for stage in stages:
        if stage.name == name:
            return stage
    known = ", ".join(stage.name for stage in stages if stage.name) or "none"
    raise ConfigError(f"{what} {name!r}, which the config does not have; its stages are: {known}")
