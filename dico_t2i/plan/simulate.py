"""Simulates long runs of a config that fail, wait, are preempted and restart. Nothing is trained, and torch not needed.

What a job does after a failure, when it saves and when it gives up is decided by ``runs.decisions``, as in real jobs.
Time passes from one interruption to the next, so a run of a month takes about a millisecond.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from dico_t2i.command import REQUEUE_EXIT_CODE
from dico_t2i.config import ReliabilityConfig
from dico_t2i.plan.intervals import daly_interval
from dico_t2i.runs.decisions import Failure, counts, decide, steps_until_save

SPENT = ("training", "slow ranks", "repeated steps", "saving", "starting", "hanging", "waiting")  # where time goes
_HOPELESS = 100  # times the time without interruptions, after which a run is ended as one that gets nowhere


@dataclass(frozen=True)
class Job:
    """A run as the simulation sees it; times are in seconds.

    step_s: a step with ranks of the usual speed. slowest: the mean and the standard deviation of the slowest rank's
    time, relative to it. every_s, every_steps: the interval between saves, in one of them. report_steps: steps between
    two lines of metrics.jsonl. pause_s: how long a save stops training. save_s: from the beginning of a save until the
    checkpoint is complete. lead_s: how long before its time limit the job is told to save.
    """

    steps: int
    step_s: float
    every_s: float | None
    every_steps: int | None
    report_steps: int
    pause_s: float
    save_s: float
    load_s: float
    hang_timeout_s: float
    limit_s: float
    lead_s: float
    nodes: int
    ranks: int
    max_requeues: int
    site: ReliabilityConfig
    slowest: tuple[float, float] = (1.0, 0.0)

    @property
    def rates(self) -> dict[str, float]:
        """The interruptions of each kind in a second."""
        site = self.site
        racks = -(-self.nodes // site.rack_nodes)
        hours = {
            "node lost": (self.nodes, site.node_mtbf_hours),
            "rack lost": (racks, site.rack_mtbf_hours),
            "rank crashed": (self.ranks, site.rank_mtbf_hours),
            "preempted": (1, site.preemption_hours),
        }
        return {kind: count / (3600 * mean) for kind, (count, mean) in hours.items() if mean}

    @property
    def mtbf_s(self) -> float:
        """The mean time between two failures, which cost the steps since the last checkpoint."""
        return 1 / sum(rate for kind, rate in self.rates.items() if kind != "preempted")


class Interruption(NamedTuple):
    """What ends a start of a job, and how many seconds after its beginning."""

    after_s: float
    kind: str


class Stretch(NamedTuple):
    """Training from the first step of a start: ``first`` steps, and then a save before each ``between`` further steps.

    All methods take the seconds since the first step began.
    """

    step_s: float
    pause_s: float
    save_s: float
    first: int
    between: int

    @property
    def cycle_s(self) -> float:
        """From the beginning of a save to that of the next one, which waits until the first is complete."""
        return max(self.pause_s + self.between * self.step_s, self.save_s)

    def steps(self, seconds: float) -> int:
        """The steps that are done."""
        return int(self.stepping(seconds) / self.step_s + 1e-9)

    def stepping(self, seconds: float) -> float:
        """The seconds that were spent on steps, rather than on saves."""
        begun = self.first * self.step_s
        if seconds < begun:
            return seconds
        saves, since = divmod(seconds - begun, self.cycle_s)
        whole = self.between * self.step_s
        return begun + saves * whole + min(whole, max(0.0, since - self.pause_s))

    def saved(self, seconds: float) -> int:
        """The steps in the newest checkpoint that is complete; 0 if there is none."""
        before = seconds - self.save_s - self.first * self.step_s
        return self.first + int(before // self.cycle_s) * self.between if before >= 0 else 0

    def seconds(self, steps: int) -> float:
        """How long a number of steps takes with the saves before the last of them."""
        rest = steps - self.first
        if rest <= 0:
            return steps * self.step_s
        saves = -(-rest // self.between)
        last = rest - (saves - 1) * self.between
        return self.first * self.step_s + (saves - 1) * self.cycle_s + self.pause_s + last * self.step_s


@dataclass
class Outcome:
    """What a simulated run came to. spent: seconds by ``SPENT``. events: how often jobs ended in which way."""

    spent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    events: Counter[str] = field(default_factory=Counter)
    finished: bool = False

    @property
    def seconds(self) -> float:
        return sum(self.spent.values())

    @property
    def goodput(self) -> float:
        """The share of all time that went into steps that count, at the usual speed."""
        return self.spent["training"] / self.seconds

    @property
    def allocated_s(self) -> float:
        """The seconds in which the run has its nodes."""
        return self.seconds - self.spent["waiting"]


def simulate(job: Job, runs: int, seed: int = 0) -> list[Outcome]:
    """Simulate a run many times. The same seed gives the same outcomes."""
    streams = np.random.SeedSequence(seed).spawn(runs)
    return [simulate_run(job, np.random.Generator(np.random.PCG64(stream))) for stream in streams]


def simulate_run(
    job: Job, generator: np.random.Generator, interruptions: Iterator[Interruption] | None = None
) -> Outcome:
    """Simulate a run once. interruptions: of each start in turn, and none when they end; random ones by default."""
    run = _Run(job, generator, interruptions or _random_interruptions(job, generator))
    hopeless = _HOPELESS * job.steps * job.step_s
    while not run.outcome.finished and run.outcome.seconds < hopeless:
        run.start()
    return run.outcome


def _random_interruptions(job: Job, generator: np.random.Generator) -> Iterator[Interruption]:
    kinds, rates = zip(*job.rates.items(), strict=True)
    borders = np.cumsum(rates).tolist()
    while True:
        after, where = generator.exponential(1 / borders[-1]), generator.random() * borders[-1]
        yield Interruption(after, next(k for k, border in zip(kinds, borders, strict=True) if where <= border))


class _Run:
    """The state of a simulated run between two starts."""

    def __init__(self, job: Job, generator: np.random.Generator, interruptions: Iterator[Interruption]) -> None:
        self.job, self.generator, self.interruptions = job, generator, interruptions
        self.outcome = Outcome()
        self.step = 0  # of the newest checkpoint
        self.reported = 0  # the last step in metrics.jsonl
        self.number = 0  # of the start within its job
        self.failures: list[Failure] = []  # of the job
        self.held_s = 0.0  # before the job is in the queue
        self.away: list[float] = []  # when each lost node is back

    def start(self) -> None:
        """Wait for nodes, and train until the run is done or interrupted."""
        job = self.job
        self._wait()
        cut = next(self.interruptions, Interruption(np.inf, ""))
        ready = job.site.start_s + (job.load_s if self.step else 0.0)
        stretch = self._stretch(min(cut.after_s, job.limit_s) - ready)
        steps = job.steps - self.step
        done = ready + stretch.seconds(steps)
        stop = job.limit_s - job.lead_s
        if min(cut.after_s, stop) >= done + job.save_s:
            self._spend(ready, stretch, done - ready, steps, saving=job.save_s)
            self._end("done", 0)
        elif cut.after_s >= stop:
            self._leave(ready, stretch, stop - ready, "time limit")
        elif cut.kind == "preempted" and cut.after_s > ready and self._saves_in_grace(stretch):
            self._leave(ready, stretch, cut.after_s - ready, "preempted")
        else:
            trained, late = min(cut.after_s, done) - ready, max(0.0, cut.after_s - done)
            self._spend(ready, stretch, trained, stretch.saved(cut.after_s - ready), saving=late)
            self._hang(cut.kind)
            self._end(cut.kind, 1)

    def _wait(self) -> None:
        """Wait for the queue, and until enough nodes are whole."""
        site = self.job.site
        wait = self.held_s + self.generator.exponential(60 * site.queue_minutes)
        now = self.outcome.seconds + wait
        self.away = sorted(back for back in self.away if back > now)
        missing = 0 if site.spare_nodes is None else len(self.away) - site.spare_nodes
        self.outcome.spent["waiting"] += wait + (self.away[missing - 1] - now if missing > 0 else 0.0)

    def _stretch(self, seconds: float) -> Stretch:
        """The steps and saves of this start, which has about this many seconds for them."""
        job = self.job
        mean, deviation = job.slowest
        steps = min(job.steps - self.step, max(1.0, seconds / job.step_s))
        slower = mean + deviation * self.generator.standard_normal() / steps**0.5 if deviation else mean
        step_s = job.step_s * slower
        every = (job.every_s, job.every_steps)
        first = steps_until_save(*every, self.step, 0.0, step_s)
        return Stretch(
            step_s, job.pause_s, job.save_s, first, steps_until_save(*every, self.step + first, job.pause_s, step_s)
        )

    def _saves_in_grace(self, stretch: Stretch) -> bool:
        return self.job.save_s + stretch.step_s <= self.job.site.preemption_grace_s

    def _leave(self, ready: float, stretch: Stretch, trained: float, kind: str) -> None:
        """Complete the step after a signal, save, and leave."""
        trained = max(0.0, trained)
        steps = min(stretch.steps(trained) + 1, self.job.steps - self.step)
        rest = steps * stretch.step_s - stretch.stepping(trained)
        self._spend(ready, stretch, trained, steps, rest, self.job.save_s)
        self._end(kind, REQUEUE_EXIT_CODE)

    def _spend(
        self, ready: float, stretch: Stretch, trained: float, kept: int, rest: float = 0.0, saving: float = 0.0
    ) -> None:
        """Account for a start that was interrupted after it had trained for some seconds.

        trained: negative if that was before the first step. kept: the steps that count. rest, saving: the seconds of
        completing the last step and of saving after the interruption.
        """
        spent = self.outcome.spent
        spent["starting"] += min(ready, ready + trained)
        trained = max(0.0, trained)
        stepping = stretch.stepping(trained)
        spent["saving"] += trained - stepping + saving
        spent["training"] += kept * self.job.step_s
        spent["slow ranks"] += kept * (stretch.step_s - self.job.step_s)
        spent["repeated steps"] += stepping + rest - kept * stretch.step_s
        if trained:
            self.reported = self._last_report(stretch.steps(trained))
        self.step += kept

    def _last_report(self, steps: int) -> int:
        """The step of the last line in metrics.jsonl: of the start, of its first step, or of a report."""
        done = self.step + steps
        return max(self.step + min(1, steps), done - done % self.job.report_steps)

    def _hang(self, kind: str) -> None:
        """Sometimes the other ranks notice only after a while that one is gone."""
        if kind != "preempted" and self.job.site.hang_share > self.generator.random():
            self.outcome.spent["hanging"] += self.job.hang_timeout_s

    def _end(self, kind: str, code: int) -> None:
        """Act as the job's supervisor and SLURM do when the ranks have ended."""
        job, now = self.job, self.outcome.seconds
        self.outcome.events[kind] += 1
        lost = {"node lost": 1, "rack lost": min(job.site.rack_nodes, job.nodes)}.get(kind, 0)
        self.away += [now + 3600 * job.site.repair_hours] * lost
        taken = bool(lost) or kind == "preempted"
        failure = None
        if code not in (0, REQUEUE_EXIT_CODE):
            failure = Failure(now, "", self.number, self.reported, code, None if taken else 0, "", kind)
        if failure and counts(failure, taken):
            self.failures.append(failure)
        act = "again" if taken else decide(code, self.number, job.max_requeues, self.failures).act
        self.outcome.finished = act == "end"
        if act == "again":
            self.number += 1
            self.held_s = job.site.requeue_s
        elif act == "give up":
            self.outcome.events["given up"] += 1
            self.number, self.failures = 0, []
            self.held_s = self.generator.exponential(3600 * job.site.relaunch_hours)


class Tried(NamedTuple):
    """An interval between saves, in seconds, and the mean goodput of runs with it."""

    every_s: float
    goodput: float


def try_intervals(job: Job, runs: int, seed: int = 0) -> list[Tried]:
    """Simulate the run with intervals around the one of Daly's formula, each with the same random numbers."""
    center = max(job.step_s, daly_interval(job.pause_s, job.mtbf_s))
    tried = []
    for every_s in center * 2.0 ** np.arange(-2, 2.5, 0.5):
        outcomes = simulate(replace(job, every_s=float(every_s), every_steps=None), runs, seed)
        tried.append(Tried(float(every_s), mean_goodput(outcomes)))
    return tried


def best_interval(tried: Sequence[Tried]) -> Tried:
    """The best interval: the top of a parabola, over the logarithm of the interval, through the best three."""
    at = max(range(len(tried)), key=lambda number: tried[number].goodput)
    if at in (0, len(tried) - 1):
        return tried[at]
    x = np.log([float(one.every_s) for one in tried[at - 1 : at + 2]])
    a, b, c = np.polyfit(x - x[1], [one.goodput for one in tried[at - 1 : at + 2]], 2)
    top = -b / (2 * a)
    return Tried(float(np.exp(x[1] + top)), float(c + b * top / 2))


def mean_goodput(outcomes: Sequence[Outcome]) -> float:
    """The training that counts in all outcomes, divided by all their time."""
    return sum(one.spent["training"] for one in outcomes) / sum(one.seconds for one in outcomes)


def slowest_of(times: Sequence[float], ranks: int) -> tuple[float, float]:
    """The mean and the standard deviation of the largest of ``ranks`` independent draws from ``times``."""
    ordered = np.sort(np.asarray(times, dtype=np.float64))
    chance = np.diff((np.arange(len(ordered) + 1) / len(ordered)) ** ranks)
    mean = float(ordered @ chance)
    return mean, math.sqrt(max(0.0, float(ordered**2 @ chance) - mean**2))
