"""What `dico plan` prints and writes: the plan, a simulation of the run, or how its speed grows with the nodes."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from dico_t2i.config import Config
from dico_t2i.plan.job import job_of
from dico_t2i.plan.plan import Plan, make_plans
from dico_t2i.plan.scaling import sweep
from dico_t2i.plan.scaling_text import draw_sweep, render_sweep, sweep_summary
from dico_t2i.plan.simulation_text import draw_simulation, render_simulation, run_simulation, summary
from dico_t2i.plan.text import refusals, render


def print_plan(config: Config, file: Path | None) -> None:
    """Print the plan. Raises ValueError, with settings that fit, if a stage does not."""
    plans = make_plans(config)
    Console().print(render(plans), highlight=False)
    contents = [{**asdict(plan), "hardware": plan.hardware.model_dump()} for plan in plans]
    _write(file, {"stages": contents} if config.stages else contents[0])
    _check(plans)


def print_simulation(
    config: Config, measured: Path | None, runs: int, seed: int, plot: Path | None, file: Path | None
) -> None:
    """Simulate the run and print what it came to. measured: the folder of a run whose times are taken."""
    plans = make_plans(config)
    _check(plans)
    simulation = run_simulation(config.name, *job_of(config, plans, measured), runs, seed)
    Console().print(render_simulation(simulation), highlight=False)
    _write(file, summary(simulation))
    if plot:
        draw_simulation(simulation, plot)


def print_sweep(config: Config, nodes: Sequence[int], per_rank: int, plot: Path | None, file: Path | None) -> None:
    """Print the speed on each number of nodes, with a batch that grows with them and with the config's own."""
    growing = sweep(config, nodes, per_rank)
    fixed = sweep(config, nodes)
    Console().print(render_sweep(config, growing, fixed), highlight=False)
    _write(file, {"growing batch": sweep_summary(growing), "fixed batch": sweep_summary(fixed)})
    if plot:
        draw_sweep(config, growing, fixed, plot)


def _check(plans: Sequence[Plan]) -> None:
    if refused := refusals(plans):
        raise ValueError(refused)


def _write(file: Path | None, content: Any) -> None:
    if file:
        file.write_text(json.dumps(content, indent=1) + "\n")
