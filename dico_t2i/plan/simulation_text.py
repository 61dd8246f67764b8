"""Prints a simulation as text and tables for the terminal, and draws it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from dico_t2i.plan.intervals import daly_interval, young_interval
from dico_t2i.plan.simulate import (
    SPENT,
    Job,
    Outcome,
    Tried,
    best_interval,
    mean_goodput,
    simulate,
    try_intervals,
)

_TRIES = 5  # the runs for one that is simulated with each interval


@dataclass(frozen=True)
class Simulation:
    """A run that was simulated many times. tried: the goodput with other intervals between saves."""

    name: str
    job: Job
    outcomes: Sequence[Outcome]
    tried: Sequence[Tried]
    notes: Sequence[str]

    @property
    def days(self) -> np.ndarray:
        """The days to the goal, of each run."""
        return np.array([outcome.seconds for outcome in self.outcomes]) / 86400

    @property
    def own(self) -> Tried:
        """The config's interval, in as many runs as the others."""
        return Tried(self.interval_s, mean_goodput(self.outcomes[: _tries(len(self.outcomes))]))

    @property
    def interval_s(self) -> float:
        """The interval of the config, in seconds."""
        return self.job.every_s or (self.job.every_steps or 0) * self.job.step_s


def run_simulation(name: str, job: Job, notes: Sequence[str], runs: int, seed: int) -> Simulation:
    """Simulate a job, with its own interval between saves and with others."""
    return Simulation(name, job, simulate(job, runs, seed), try_intervals(job, _tries(runs), seed), notes)


def _tries(runs: int) -> int:
    """How many of the runs are simulated for each interval."""
    return min(runs, max(20, runs // _TRIES))


def summary(simulation: Simulation) -> dict[str, Any]:
    """The numbers for a file."""
    job, outcomes = simulation.job, simulation.outcomes
    events: Counter[str] = sum((one.events for one in outcomes), Counter())
    return {
        "runs": len(outcomes),
        "unfinished": sum(not one.finished for one in outcomes),
        "goodput": mean_goodput(outcomes),
        "days": dict(zip(("10 %", "50 %", "90 %"), np.percentile(simulation.days, (10, 50, 90)).tolist(), strict=True)),
        "lost_gpu_hours": {part: _hours(outcomes, part) * job.ranks for part in SPENT if part != "training"},
        "events": {kind: count / len(outcomes) for kind, count in events.items()},
        "interval_s": simulation.interval_s,
        "best_interval_s": best_interval(simulation.tried).every_s,
        "young_interval_s": young_interval(job.pause_s, job.mtbf_s),
        "daly_interval_s": daly_interval(job.pause_s, job.mtbf_s),
        "tried": [list(one) for one in simulation.tried],
    }


def render_simulation(simulation: Simulation) -> Group:
    """The simulation for rich's console."""
    found, job = summary(simulation), simulation.job
    ideal = job.steps * job.step_s / 86400
    days = ", ".join(f"{value:,.2f} ({share})" for share, value in found["days"].items())
    head = [
        f"{simulation.name}: {found['runs']:,} simulated runs on {job.nodes} nodes with {job.ranks} devices;"
        f" a step takes {job.step_s:.4g} s, a start {job.site.start_s:.4g} s, a save {job.save_s:.4g} s, of which"
        f" {job.pause_s:.3g} s pause training",
        f"a failure every {job.mtbf_s / 3600:,.1f} hours on average",
        f"days to the goal: {days}; {ideal:,.2f} without any loss",
        f"goodput: {100 * found['goodput']:.2f} % of all time",
    ]
    if found["unfinished"]:
        head.append(f"{found['unfinished']} runs get nowhere: they were ended after a hundred times that")
    best = best_interval(simulation.tried)
    other = (
        f"saves every {_clock(simulation.interval_s)}: goodput {100 * simulation.own.goodput:.3f} %; best every"
        f" {_clock(best.every_s)}: {100 * best.goodput:.3f} %, in {_tries(found['runs'])} runs; by Young's formula"
        f" {_clock(found['young_interval_s'])}, by Daly's {_clock(found['daly_interval_s'])}"
    )
    return Group(*head, _spent(simulation), _events(found), other, *(f"note: {note}" for note in simulation.notes))


def _spent(simulation: Simulation) -> Table:
    table = Table("of a run, on average", "hours", "% of all time", "GPU-hours")
    total = sum(_hours(simulation.outcomes, part) for part in SPENT)
    for part in SPENT:
        hours = _hours(simulation.outcomes, part)
        lost = "not allocated" if part == "waiting" else f"{hours * simulation.job.ranks:,.1f}"
        table.add_row(part, f"{hours:,.2f}", f"{100 * hours / total:.2f}", lost)
    return table


def _events(found: dict[str, Any]) -> str:
    events = {kind: count for kind, count in sorted(found["events"].items()) if kind != "done"}
    return "ends of a start, per run: " + (", ".join(f"{kind} {count:.2f}" for kind, count in events.items()) or "none")


def _hours(outcomes: Sequence[Outcome], part: str) -> float:
    return sum(one.spent[part] for one in outcomes) / len(outcomes) / 3600


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def draw_simulation(simulation: Simulation, path: Path) -> None:
    """Draw the days to the goal and the goodput by the interval between saves, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(simulation.days, bins=40, color="#4477aa")
    for share, style in ((10, ":"), (50, "-"), (90, ":")):
        left.axvline(float(np.percentile(simulation.days, share)), color="black", linestyle=style, linewidth=1)
    left.set(xlabel="days to the goal (lines: 10, 50, 90 %)", ylabel="simulated runs", title=simulation.name)
    job = simulation.job
    intervals, goodputs = zip(*simulation.tried, strict=True)
    right.semilogx([each / 60 for each in intervals], [100 * each for each in goodputs], "o-", color="#4477aa")
    for seconds, label, style in (
        (simulation.interval_s, "config", "-"),
        (best_interval(simulation.tried).every_s, "best", "--"),
        (daly_interval(job.pause_s, job.mtbf_s), "Daly", ":"),
    ):
        right.axvline(seconds / 60, color="black", linestyle=style, linewidth=1, label=label)
    right.set(xlabel="minutes between saves", ylabel="goodput, %")
    right.legend()
    figure.savefig(path, dpi=120)
