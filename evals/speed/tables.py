"""Shows the results of evals/throughput.py as tables for the terminal and for docs/performance.md, a plot, and JSON."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from evals.speed.measure import Result

COLUMNS = ("case", "", "ms", "images/s", "MFU", "GB/s", "GB", "the first is faster by", "goal")
_MOST_OPERATORS = 10


@dataclass(frozen=True)
class Goal:
    """The goal for our network. ratio: how many times faster than each contender; images_per_s, tflops: its own."""

    ratio: dict[str, float]
    images_per_s: float | None = None
    tflops: float | None = None


@dataclass
class Finding:
    """A case and its results; ours is the first one."""

    case: str
    goal: Goal
    results: list[Result]


def ratios(finding: Finding, other: Result) -> list[float]:
    """How many times faster ours was, in each round."""
    ours = finding.results[0]
    return [theirs / mine for mine, theirs in zip(ours.seconds, other.seconds, strict=True)]


def rows(findings: Sequence[Finding], peak: float) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table, as cells; peak in operations per second."""
    for finding in findings:
        for number, result in enumerate(finding.results):
            spread = f"{_short(1e3 * min(result.seconds))} to {_short(1e3 * max(result.seconds))}"
            cost = result.cost
            yield (
                "" if number else finding.case,
                result.name,
                f"{_short(1e3 * result.median)} ({spread})",
                _short(result.images_per_s),
                f"{cost.flops / result.median / peak:.1%}" if cost else "",
                f"{cost.traffic / result.median / 1e9:,.0f}" if cost and cost.traffic else "",
                f"{result.peak_memory / 1e9:.2f}" if result.peak_memory else "",
                _ratio(finding, result) if number else "",
                _goal(finding, result, number == 0),
            )


def _ratio(finding: Finding, other: Result) -> str:
    each = sorted(ratios(finding, other))
    return f"{statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})"


def _goal(finding: Finding, result: Result, is_ours: bool) -> str:
    goal = finding.goal
    if not is_ours:
        wanted = goal.ratio.get(result.name)
        return (
            "" if wanted is None else _verdict(f"{wanted:.3g}x", statistics.median(ratios(finding, result)) >= wanted)
        )
    told = []
    if goal.images_per_s:
        told.append(_verdict(f"{goal.images_per_s:,.0f} images/s", result.images_per_s >= goal.images_per_s))
    if goal.tflops and result.cost:
        reached = result.cost.flops / result.median / 1e12
        told.append(_verdict(f"{goal.tflops:g} TFLOP/s (has {reached:.3g})", reached >= goal.tflops))
    return ", ".join(told)


def _short(value: float) -> str:
    """Three digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _verdict(goal: str, reached: bool) -> str:
    return f"{goal}: {'reached' if reached else 'not reached'}"


def table(findings: Sequence[Finding], peak: float) -> Table:
    shown = Table(*COLUMNS)
    for row in rows(findings, peak):
        shown.add_row(*row, end_section=False)
    return shown


def operator_table(finding: Finding) -> Table:
    """The operators with the largest shares of the time, for all contenders side by side."""
    shown = Table(*(name for result in finding.results for name in (result.name, "")), title=finding.case)
    for number in range(_MOST_OPERATORS):
        shown.add_row(*(cell for result in finding.results for cell in _operator(result, number)))
    return shown


def _operator(result: Result, number: int) -> tuple[str, str]:
    if number >= len(result.operators):
        return "", ""
    name, share = result.operators[number]
    return name[:60], f"{share:.1%}"


def markdown(setting: dict[str, Any], findings: Sequence[Finding], peak: float, profiled: bool) -> str:
    """The tables in the form of docs/performance.md."""
    lines = [f"{key}: {value}  " for key, value in setting.items()]
    lines += ["", *_markdown(COLUMNS, rows(findings, peak))]
    for finding in findings if profiled else ():
        names = [name for result in finding.results for name in (result.name, "share")]
        cells = ([c for r in finding.results for c in _operator(r, n)] for n in range(_MOST_OPERATORS))
        lines += ["", f"Largest operators, {finding.case}:", "", *_markdown(names, cells)]
    return "\n".join(lines) + "\n"


def _markdown(head: Sequence[str], body: Iterator[Sequence[str]] | Any) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *body):
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"


def as_json(setting: dict[str, Any], findings: Sequence[Finding], peak: float) -> dict[str, Any]:
    """All results, with the seconds of every round."""
    cases = []
    for finding in findings:
        results = [
            {
                **asdict(r),
                "images_per_s": r.images_per_s,
                "median_s": r.median,
                "times_ours": statistics.median(ratios(finding, r)),
            }
            for r in finding.results
        ]
        cases.append({"case": finding.case, "goal": asdict(finding.goal), "results": results})
    return {**setting, "peak_flops": peak, "cases": cases}


def plot(findings: Sequence[Finding], title: str, path: Path) -> None:
    """Plot images per second of every contender, with one panel for each case."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + sum(0.4 + 0.3 * len(f.results) for f in findings)), layout="constrained")
    panels = figure.subplots(
        len(findings), squeeze=False, height_ratios=[1 + len(finding.results) for finding in findings]
    )[:, 0]
    for panel, finding in zip(panels, findings, strict=True):
        names = [result.name for result in finding.results]
        speeds = [result.images_per_s for result in finding.results]
        low = [r.images_per_s - r.images / max(r.seconds) for r in finding.results]
        high = [r.images / min(r.seconds) - r.images_per_s for r in finding.results]
        colours = ["tab:blue" if name.startswith("ours") else "tab:grey" for name in names]
        panel.barh(names, speeds, xerr=(low, high), color=colours)
        panel.invert_yaxis()
        panel.set_title(finding.case, loc="left", fontsize=9)
        panel.tick_params(labelsize=8)
    panels[-1].set_xlabel("images/s")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
