"""Gives networks equal steps, or as many steps as fit into the CPU time of the first one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dico_t2i.config import Config, load_config
from evals.comparison.cost import kept_step_seconds

Equal = Literal["steps", "time"]
EQUAL: tuple[Equal, ...] = ("steps", "time")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # as the steps are timed


def equal_changes(equal: Equal, files: Sequence[Path], overrides: Sequence[str], runs: Path) -> list[list[str]]:
    """The changes of each config that make them equal; none for a config that stays as it is.

    The seconds of the steps are kept in runs/step_seconds.json. Raises ValueError as ``equal_time`` does.
    """
    configs = [load_config(file, overrides) for file in files]
    if equal == "steps":
        return [[] for _ in configs]
    runs.mkdir(parents=True, exist_ok=True)
    names = [" ".join([str(file), *overrides]) for file in files]
    return equal_time(configs, kept_step_seconds(names, configs, runs / "step_seconds.json"))


def equal_time(configs: Sequence[Config], seconds: Sequence[float]) -> list[list[str]]:
    """The changes with which each config takes as long as the first one does.

    seconds: of one step of each config. Raises ValueError for a config with stages or alignment, whose time is not
    measured, or without a number of steps.
    """
    for config in configs:
        if config.stages or config.alignment or not config.train.duration.steps:
            raise ValueError(
                f"--equal time: {config.name} has stages, alignment, or no train.duration.steps; use --equal steps"
            )
    budget = (configs[0].train.duration.steps or 0) * seconds[0]
    changes = []
    for config, each in zip(configs, seconds, strict=True):
        steps = round(budget / each)
        own = steps == config.train.duration.steps
        changes.append([] if own else [f"train.duration.steps={steps}", f"validation.every.steps={steps}"])
    return changes


def run_name(config: Config, seed: int, changes: Sequence[str]) -> str:
    """The name of a run of a comparison; one that is changed to take equal time has a run of its own."""
    return f"{config.name}-{seed}{'-time' if changes else ''}"
