"""What a run wrote into metrics.jsonl, in memory that does not grow with the length of the run."""

import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dico_t2i.runs.log import json_lines

POINTS = 1500  # of a curve, at most
EVENTS = 500  # told one by one, at most; the newest are kept
MARKS = 300  # of a kind on the time axis, at most

# Kinds of which there may be very many: counted by what they say, not listed one by one.
_COUNTED = {"saved": "checkpoints", "samples": "sample grids", "skip": "no usable gradient, or a spike"}
_PAUSED = ("start", "resume", "config", "bad checkpoint")  # told before training goes on: the time before is no work
_STATES = {"start": "running, or cut off", "stop": "stopped", "done": "done", "failed": "failed", "hang": "failed"}


@dataclass(slots=True)
class Stretch:
    """Reports in a row, as one point of a curve."""

    first: int  # step
    last: int
    total: float
    low: float
    high: float
    count: int

    def add(self, last: int, total: float, low: float, high: float, count: int) -> None:
        """Take in what comes after."""
        self.last, self.total, self.count = last, self.total + total, self.count + count
        if low < self.low:
            self.low = low
        if high > self.high:
            self.high = high


class Curve:
    """A quantity over steps: itself, or mean, lowest and highest of equal numbers of reports where there are many.

    Where a run has gone back to an earlier step, what it does then counts.
    """

    def __init__(self, points: int = POINTS) -> None:
        self._points, self._width = points, 1
        self._stretches: list[Stretch] = []

    def add(self, step: int, value: float) -> None:
        """One report; what is not finite is left out."""
        if not math.isfinite(value):
            return
        while self._stretches and self._stretches[-1].first >= step:
            self._stretches.pop()
        if self._stretches and self._stretches[-1].count < self._width:
            self._stretches[-1].add(step, value, value, value, 1)
        else:
            self._stretches.append(Stretch(step, step, value, value, value, 1))
        if len(self._stretches) > self._points:
            self._halve()

    def rows(self) -> list[list[float]]:
        """[step, mean], or where reports were put together [step, mean, lowest, highest]; six digits."""
        merged = any(stretch.count > 1 for stretch in self._stretches)
        return [
            [(b.first + b.last) / 2, *map(_rounded, (b.total / b.count, *((b.low, b.high) if merged else ())))]
            for b in self._stretches
        ]

    @property
    def is_zero(self) -> bool:
        return all(stretch.low == stretch.high == 0 for stretch in self._stretches)

    @property
    def newest(self) -> float | None:
        return self._stretches[-1].total / self._stretches[-1].count if self._stretches else None

    @property
    def lowest(self) -> float | None:
        return min((stretch.low for stretch in self._stretches), default=None)

    @property
    def median(self) -> float | None:
        means = sorted(stretch.total / stretch.count for stretch in self._stretches)
        return means[len(means) // 2] if means else None

    def _halve(self) -> None:
        pairs = self._stretches[::2]
        for first, second in zip(pairs, self._stretches[1::2], strict=False):
            first.add(second.last, second.total, second.low, second.high, second.count)
        self._stretches, self._width = pairs, 2 * self._width


@dataclass
class Event:
    """Something that happened, once or, from ``step`` to ``last``, often."""

    step: int
    last: int
    time: float
    kind: str
    text: str
    count: int = 1


@dataclass
class History:
    """A run as its metrics.jsonl and failures.jsonl tell it."""

    curves: dict[str, Curve] = field(default_factory=dict)
    single: deque[Event] = field(default_factory=lambda: deque(maxlen=EVENTS))
    counted: dict[tuple[str, str], Event] = field(default_factory=dict)
    marks: dict[str, list[int]] = field(default_factory=dict)  # kind -> steps
    state: str = "new"
    step: int = 0
    seconds: float = 0.0  # at work: pauses between starts are left out
    newest: float = 0.0  # time of the last line
    start: dict[str, Any] = field(default_factory=dict)  # the newest start's own words
    unreadable: int = 0  # lines

    def add(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl. Raises KeyError, TypeError or ValueError for what is none."""
        step, time = int(line["step"]), float(line["time"])
        kind = line.get("event")
        if self.newest and kind not in _PAUSED:
            self.seconds += max(0.0, time - self.newest)
        self.newest = time
        if kind is not None:
            self._add_event(step, time, str(kind), str(line.get("message", "")))
            if kind == "start":
                self.start = line
            elif kind == "done" and "total_steps" in line:  # a start that had nothing to do, of a duration in the past
                self.start = {**self.start, "total_steps": line["total_steps"]}
            return
        self.step = step
        for key, value in line.items():
            if isinstance(value, int | float) and key not in ("step", "time"):
                self.curves.setdefault(key, Curve()).add(step, value)
        if line.get("skipped_steps"):
            self._add_event(step, time, "skip", "", int(line["skipped_steps"]))

    def add_failure(self, line: dict[str, Any]) -> None:
        """One line of failures.jsonl, written by the job's supervisor. Raises as ``add`` does."""
        said = str(line["error"]).splitlines() or [f"code {line['code']}"]
        who = "" if line.get("rank") is None else f"rank {line['rank']} on {line['host']}: "
        self._add_event(int(line["step"]), float(line["time"]), "failure", who + said[-1])

    def count_unreadable(self) -> None:
        """One line that could not be read."""
        self.unreadable += 1

    def events(self) -> list[Event]:
        """In the order of time; those that are counted stand where they first happened."""
        return sorted([*self.single, *self.counted.values()], key=lambda event: event.time)

    def marked(self) -> dict[str, list[int]]:
        """Steps at which each kind happened, thinned out where there are many."""
        return {kind: steps[:: -(-len(steps) // MARKS)] for kind, steps in self.marks.items()}

    def _add_event(self, step: int, time: float, kind: str, text: str, count: int = 1) -> None:
        self.state = _STATES.get(kind, self.state)
        self.marks.setdefault(kind, []).append(step)
        what = _COUNTED.get(kind, _shard_and_reason(text) if kind == "bad sample" else None)
        event = Event(step, step, time, kind, what or text, count)
        if what is None or (len(self.counted) >= EVENTS and (kind, what) not in self.counted):
            self.single.append(event)
            return
        known = self.counted.setdefault((kind, what), event)
        if known is not event:
            known.last, known.count = step, known.count + count


def read_history(run: Path) -> History:
    """Of a run folder. Lines that are not whole, such as one being written, are counted and passed over."""
    history = History()
    for line in json_lines(run / "metrics.jsonl", history.count_unreadable):
        try:
            history.add(line)
        except (KeyError, TypeError, ValueError):
            history.count_unreadable()
    for line in json_lines(run / "failures.jsonl", history.count_unreadable):
        try:
            history.add_failure(line)
        except (KeyError, TypeError, ValueError):
            history.count_unreadable()
    return history


def _shard_and_reason(text: str) -> str:
    """Of the message about a bad sample, what it shares with others of its kind."""
    shard, _, rest = text.removesuffix("; another took its place").partition(" ")
    return f"{shard}: {rest.partition(': ')[2] or rest}"


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
