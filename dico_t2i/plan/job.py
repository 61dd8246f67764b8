"""Makes the job to simulate from a config, its plan, and times that a run has measured."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dico_t2i.config import Config, ReliabilityConfig
from dico_t2i.plan.plan import Plan
from dico_t2i.plan.simulate import Job, slowest_of
from dico_t2i.runs.decisions import minutes, signal_lead_s
from dico_t2i.runs.log import json_lines
from dico_t2i.text_lines import read_text

HOST_COPY = 3e9  # assumed bytes per second of a rank's copy to host memory, for which a save in the background pauses


def job_of(config: Config, plans: Sequence[Plan], measured: Path | None = None) -> tuple[Job, list[str]]:
    """The job of a run, and notes on times that were assumed. plans: of each stage; a step takes their mean.

    measured: the folder of a run whose times are taken. Raises ValueError if the length of the run is not known, or
    a file cannot be used.
    """
    cluster, steps = config.cluster, [plan.steps for plan in plans]
    site = cluster.reliability.model_copy(update=measured_times(measured) if measured else {})
    if not all(steps):
        raise ValueError("train.duration: it is in epochs and there are no data yet; give steps or images")
    total = sum(filter(None, steps))
    mean = sum((plan.steps or 0) * plan.estimate.step_s for plan in plans) / total
    times, notes = _times(config, plans[0], site, mean)
    limit_s = 60.0 * minutes(cluster.time)
    return Job(
        steps=total,
        every_s=60 * config.checkpoint.every.minutes if config.checkpoint.every.minutes else None,
        every_steps=_in_steps(config),
        report_steps=config.log.every.in_steps(config.train.global_batch, 0) or 1,
        hang_timeout_s=config.train.hang_timeout_s,
        limit_s=limit_s,
        lead_s=signal_lead_s(limit_s, cluster.signal_lead_s, times["step_s"] + times["save_s"]),
        nodes=cluster.nodes,
        ranks=cluster.ranks,
        max_requeues=cluster.max_requeues,
        site=site,
        slowest=_slowest(site, cluster.ranks),
        **times,
    ), notes


def measured_times(run: Path) -> dict[str, float]:
    """The mean times in a run's metrics.jsonl: keys of ``ReliabilityConfig``.

    The start is that of the resumed starts, if there are any, and then includes loading. Raises ValueError if the run
    has not reported enough.
    """
    lines = list(json_lines(run / "metrics.jsonl"))
    steps = _steps(lines)
    saves = [line for line in lines if line.get("event") == "saved" and "seconds" in line]
    fresh, resumed = _starts(lines)
    for what, found in (("reports", steps), ("saves", saves), ("starts with start_s", fresh + resumed)):
        if not found:
            raise ValueError(f"--measured {run}: no {what} in its metrics.jsonl; give a run that has trained and saved")
    return {
        "step_s": fmean(steps),
        "pause_s": fmean(save["pause_s"] for save in saves),
        "save_s": fmean(save["seconds"] for save in saves),
        "start_s": max(0.0, fmean(resumed or fresh) - fmean(steps)),
        **({"load_s": 0.0} if resumed else {}),
    }


def _steps(lines: Sequence[dict[str, Any]]) -> list[float]:
    """The seconds of a step in each report but the first of each start, whose first step belongs to the start."""
    found: tuple[list[float], list[float]] = ([], [])
    first = False
    for line in lines:
        if "step_s" in line:
            found[first].append(line["step_s"])
            first = False
        first = first or line.get("event") == "memory"
    return found[0] or found[1]


def _starts(lines: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """The seconds from the beginning of the process to the end of its first step, of new and of resumed starts."""
    found: tuple[list[float], list[float]] = ([], [])
    resumed = False
    for line in lines:
        if line.get("event") == "resume":
            resumed = True
        elif line.get("event") == "memory":
            if "start_s" in line:
                found[resumed].append(line["start_s"])
            resumed = False
    return found


def _times(config: Config, plan: Plan, site: ReliabilityConfig, step_s: float) -> tuple[dict[str, float], list[str]]:
    """The times of a step, a save and a load: given, or assumed; and a note on those that are assumed."""
    written = plan.checkpoint_s
    copied = plan.checkpoint_bytes / plan.ranks / HOST_COPY
    save_s = _chosen(site.save_s, written + copied)
    assumed = {
        "step_s": step_s,
        "save_s": save_s,
        "pause_s": copied if config.checkpoint.background else save_s,
        "load_s": 2 * written,  # read once to verify it, and once to load it
    }
    times = {key: _chosen(getattr(site, key), value) for key, value in assumed.items()}
    unknown = ", ".join(key for key in assumed if getattr(site, key) is None)
    note = f"assumed, not measured: {unknown} (cluster.reliability, or --measured RUN)"
    return times, [note] if unknown else []


def _chosen(given: float | None, assumed: float) -> float:
    return assumed if given is None else given


def _in_steps(config: Config) -> int | None:
    every = config.checkpoint.every
    if every.epochs is not None:
        raise ValueError("checkpoint.every: the simulation takes minutes, steps or images, not epochs")
    return every.in_steps(config.train.global_batch, 0)


def _slowest(site: ReliabilityConfig, ranks: int) -> tuple[float, float]:
    if site.slow_steps is None:
        return 1.0, 0.0
    file = Path(site.slow_steps)
    try:
        times = [float(line) for line in read_text(file).split()]
    except ValueError:
        times = []
    if not times or not all(0 < time < math.inf for time in times):
        raise ValueError(f"cluster.reliability.slow_steps: {file}: expected a positive number on each line")
    return slowest_of(times, ranks)
