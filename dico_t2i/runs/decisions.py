"""What is decided about a run while it trains and when it ends: when it saves, what restarts, when a job gives up.

Jobs and training act on these functions, and `dico plan --simulate` computes with them.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dico_t2i.command import USER_ERROR
from dico_t2i.config import ConfigError

UNMEASURED_LEAD_S = 300  # used until a run's first save has been timed


@dataclass(frozen=True)
class Failure:
    """The reason why a start of a run failed, from the first rank that failed."""

    time: float
    job: str
    start: int
    step: int  # the last one that the run has reported
    code: int
    rank: int | None  # None if no rank could leave a note, as when a node is lost
    host: str
    error: str


@dataclass(frozen=True)
class Decision:
    """What to do after the ranks have ended."""

    act: Literal["end", "again", "give up"]
    why: str


def decide(code: int, start: int, max_requeues: int, failures: Sequence[Failure]) -> Decision:
    """Decide what to do after a start has ended. failures: this job's, newest last, including one of this start."""
    failure = failures[-1] if failures and failures[-1].start == start else None
    if failure is None and code == 0:
        return Decision("end", "done")
    if failure and failure.code == USER_ERROR:
        return Decision("give up", "given up: correct this error, then launch again")
    if failure and any(other.step == failure.step for other in failures[:-1]):
        first = next(other for other in failures if other.step == failure.step)
        return Decision(
            "give up", f"given up: failed twice at step {failure.step}. The first error was:\n{first.error}"
        )
    if start >= max_requeues:
        return Decision("give up", f"given up: requeued {start} times (--max-requeues); launch again to resume")
    return Decision("again", "stopped by a signal, resumes from its checkpoint" if not failure else "trying again")


def counts(failure: Failure | None, taken: bool) -> bool:
    """Whether a failure is recorded, and so may end the job. taken: the scheduler has taken the job's nodes away.

    Ranks that are killed then leave no note, and are not to blame.
    """
    return failure is not None and not (taken and failure.rank is None)


def save_is_due(every_s: float | None, every_steps: int | None, step: int, since_s: float) -> bool:
    """Whether a run saves after ``step``. every_s, every_steps: the interval, in one of them. since_s: the last save's
    age."""
    if every_s is not None:
        return since_s >= every_s
    return every_steps is not None and step % every_steps == 0


def steps_until_save(every_s: float | None, every_steps: int | None, step: int, since_s: float, step_s: float) -> int:
    """How many steps of ``step_s`` seconds follow ``step`` until ``save_is_due``."""
    if every_s is not None:
        return max(1, math.ceil((every_s - since_s) / step_s - 1e-9))
    assert every_steps is not None
    return every_steps - step % every_steps


def signal_lead_s(limit_s: float, chosen_s: int | None, pause_s: float | None) -> int:
    """How long before a job's time limit its ranks are told to save, in seconds.

    chosen_s: the config's, with none it is computed. pause_s: the slowest step plus the last save, None before they are
    known. Raises ValueError if the config's is not shorter than the limit.
    """
    if chosen_s is not None:
        if chosen_s >= limit_s:
            raise ValueError(f"--signal-lead {chosen_s}: must be shorter than the time limit of {limit_s:.0f} s")
        return chosen_s
    lead = UNMEASURED_LEAD_S if pause_s is None else round(60 + 2 * pause_s)
    return min(lead, int(limit_s // 2))


def minutes(time_limit: str) -> int:
    """A time limit in sbatch's notation (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S), in whole minutes, at least 1."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time_limit)
    if not match:
        raise ConfigError(f"cluster.time: {time_limit!r} is not of the form minutes, H:M:S or days-H:M:S")
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None:  # D-H, D-H:M, D-H:M:S
        seconds = int(days) * 86400 + sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    else:  # M, M:S, H:M:S
        units = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(parts)]
        seconds = sum(part * unit for part, unit in zip(parts, units, strict=True))
    if seconds == 0:
        raise ConfigError(f"cluster.time: {time_limit!r} must be longer than 0")
    return -(-seconds // 60)
