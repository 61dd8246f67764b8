"""Builds the page: the tables here, while the browser draws the curves from numbers in the page.

The page loads nothing from elsewhere, and all text from runs is escaped.
"""

import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib.resources import files
from typing import Any

from dico_t2i.report.history import Curve, Event
from dico_t2i.report.record import Record
from dico_t2i.runs.evaluations import doubts, measured, protocol_name, shown_numbers
from dico_t2i.runs.lineage import lineage_table

_BAND = "val_loss_t"
_PACKAGES = ("torch", "deepspeed", "transformers", "diffusers", "triton", "numpy", "wandb", "dico_t2i")
_HIDDEN = ("images", "epoch", "eta_s", "skipped_steps")  # the axis or the events show the same


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    key: str  # the key of its curves
    title: str
    group: str
    noisy: bool = False  # the reader can smooth it
    percent: bool = False


_TRAINING, _BANDS, _SPEED, _EVALUATIONS, _OTHER = (
    "Training",
    "Validation loss by timestep",
    "Speed and memory",
    "Evaluations over steps",
    "Other",
)
_PANELS = (
    Panel("loss", "Training loss", _TRAINING, noisy=True),
    Panel("val_loss", "Validation loss", _TRAINING),
    Panel("grad_norm", "Gradient norm", _TRAINING, noisy=True),
    Panel("ema_distance", "Distance of the average from the weights", _TRAINING),
    Panel("lr", "Learning rate", _TRAINING),
    Panel("images_per_s", "Images/s", _SPEED, noisy=True),
    Panel("data_wait", "Time spent waiting for data", _SPEED, noisy=True, percent=True),
    Panel("flops_utilization", "Model FLOPs utilisation", _SPEED, noisy=True, percent=True),
    Panel("step_s", "Seconds per step", _SPEED, noisy=True),
    Panel("other_s", "Seconds of saves, previews and validation", _SPEED),
    Panel("peak_memory_gb", "Peak memory, GB", _SPEED),
)


def make_page(records: Sequence[Record]) -> str:
    """The whole HTML document."""
    curves = [_curves(record) for record in records]
    payload = {
        "panels": [asdict(panel) for panel in _panels(curves)],
        "runs": [_run_data(record, found) for record, found in zip(records, curves, strict=True)],
    }
    parts = {
        "title": escape(", ".join(record.name for record in records)),
        "style": _part("page.css"),
        "script": _part("page.js"),
        # The replacement prevents a </script> in a prompt.
        "data": json.dumps(payload, allow_nan=False).replace("<", "\\u003c"),
        "cards": "".join(_card(number, record) for number, record in enumerate(records)),
        "samples": _section("samples", "Samples", '<div id="sample-grids"></div>' if _has_pictures(records) else ""),
        "evaluations": _section("evaluations", "Evaluations", _evaluations(records)),
        "lineage": _section("lineage", "Lineage", _lineages(records)),
        "differences": _section("config", "Config", _configs(records)),
        "events": _section("events", "Events", _events(records)),
        "starts": _section("starts", "Starts", _starts(records)),
        "made": f"made {time.strftime('%Y-%m-%d %H:%M %Z')} by <code>dico report</code>",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: parts[slot[1]], _part("page.html"))


def _part(name: str) -> str:
    return (files("dico_t2i.report") / name).read_text(encoding="utf-8")


def _curves(record: Record) -> dict[str, Curve]:
    """The curves of training, and "evaluation/<protocol>/<number>" if several checkpoints were evaluated."""
    found = {k: c for k, c in record.history.curves.items() if k not in _HIDDEN and not c.is_zero}
    evaluated: dict[str, Curve] = {}
    for result in record.evaluations:
        for name, value in shown_numbers(result).items():
            evaluated.setdefault(f"evaluation/{protocol_name(result)}/{name}", Curve()).add(result["step"], value)
    return found | {key: curve for key, curve in evaluated.items() if len(curve.rows()) > 1}


def _panels(curves: Sequence[dict[str, Curve]]) -> list[Panel]:
    """The panels: known quantities first, then all others under their own names."""
    keys = set().union(*curves)
    known = [panel for panel in _PANELS if panel.key in keys]
    bands = sorted((key for key in keys if _is_band(key)), key=lambda key: int(key.removeprefix(_BAND)))
    rest = sorted(keys - {panel.key for panel in known} - set(bands))
    return [
        *(panel for panel in known if panel.group == _TRAINING),
        *(Panel(key, f"t = {key.removeprefix(_BAND)}", _BANDS) for key in bands),
        *(panel for panel in known if panel.group == _SPEED),
        *(Panel(k, _evaluation_title(k), _EVALUATIONS) for k in rest if k.startswith("evaluation/")),
        *(
            Panel(key, key, _OTHER, noisy=not key.startswith("val_"))
            for key in rest
            if not key.startswith("evaluation/")
        ),
    ]


def _evaluation_title(key: str) -> str:
    protocol, _, number = key.removeprefix("evaluation/").rpartition("/")
    return f"{number}, {protocol}"


def _is_band(key: str) -> bool:
    return key.startswith(_BAND) and key.removeprefix(_BAND).isdecimal()


def _run_data(record: Record, curves: dict[str, Curve]) -> dict[str, Any]:
    return {
        "name": record.name,
        "batch": record.history.images / record.history.step if record.history.images else record.batch,
        "curves": {key: curve.rows() for key, curve in curves.items()},
        "marks": record.history.marked(),
        "pictures": [asdict(picture) for picture in record.pictures],
    }


def _card(number: int, record: Record) -> str:
    """The summary of a run and its progress."""
    history, start = record.history, record.starts[-1] if record.starts else {}
    total = history.start.get("total_steps")
    share = min(1.0, history.step / total) if isinstance(total, int | float) and total else 0.0
    of = f" of {total:,}" if isinstance(total, int) else ""
    of += ", nothing to do" if isinstance(total, int) and history.step > total else ""
    loss, val, speed = (history.curves.get(key, Curve()) for key in ("loss", "val_loss", "images_per_s"))
    parameters = history.start.get("parameters")
    facts = {
        "steps": f"{history.step:,}{of}",
        "stage": str(history.start.get("stage", "")),
        "images seen": f"{history.images or history.step * record.batch:,}",
        "loss": _number(loss.newest),
        "validation loss": _number(val.newest),
        "lowest so far": _number(val.lowest),
        "images/s, median": _number(speed.median),
        "training time": _duration(history.seconds),
        "parameters": f"{parameters / 1e6:,.1f}M" if isinstance(parameters, int | float) else "",
        "ranks": str(start.get("ranks", "")),
        "device": str(start.get("device", "")),
        "starts": str(len(record.starts) or ""),
    }
    tiles = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items() if v)
    state = history.state
    return (
        f'<article class="card run{number % 8}"><h2><i class="swatch"></i>{escape(record.name)}'
        f' <span class="state {state.split(",")[0]}">{escape(state)}</span></h2>'
        f'<div class="progress"><i style="width:{100 * share:.1f}%"></i></div><dl>{tiles}</dl>'
        f'<p class="path">{escape(str(record.path))}</p></article>'
    )


def _evaluations(records: Sequence[Record]) -> str:
    """A table for each protocol, with all runs."""
    groups: dict[str, list[tuple[Record, dict[str, Any]]]] = {}
    for record in records:
        for result in record.evaluations:
            groups.setdefault(protocol_name(result), []).append((record, result))
    return "".join(_evaluation_table(name, rows) for name, rows in groups.items())


def _evaluation_table(protocol: str, rows: Sequence[tuple[Record, dict[str, Any]]]) -> str:
    names = list(dict.fromkeys(name for _, result in rows for name in shown_numbers(result)))
    why = list(dict.fromkeys(line for _, result in rows for line in doubts(result)))
    body = [
        [
            record.name,
            f"{result['step']:,}",
            str(result.get("images", "")),
            *(measured(result, name) for name in names),
        ]
        for record, result in rows
    ]
    note = f'<p class="warning">Not comparable with published numbers: {escape("; ".join(why))}</p>' if why else ""
    return f"<h3>{escape(protocol)}</h3>{note}" + _table(["run", "step", "images", *names], body, numeric=1)


def _lineages(records: Sequence[Record]) -> str:
    """The sources of each run's weights, the oldest first; empty if all runs started from random weights."""
    rows = [[record.name, *row] for record in records for row in lineage_table(record.lineage)]
    return _table(["run", "what", "from", "step", "sha256"], rows) if rows else ""


def _configs(records: Sequence[Record]) -> str:
    """The keys in which the runs differ, then all keys."""
    keys = list(dict.fromkeys(key for record in records for key in record.config))
    names = [record.name for record in records]
    different = [key for key in keys if len({_value(record, key) for record in records}) > 1]
    rows = [[key, *(_value(record, key) for record in records)] for key in different]
    parts = []
    if len(records) > 1:
        parts.append(_table(["different", *names], rows) if rows else "<p>The configs are the same.</p>")
    whole = _table(["key", *names], [[key, *(_value(record, key) for record in records)] for key in keys])
    return "".join(parts) + f"<details><summary>all {len(keys)} keys</summary>{whole}</details>"


def _value(record: Record, key: str) -> str:
    return json.dumps(record.config[key], ensure_ascii=False, default=str) if key in record.config else ""


def _events(records: Sequence[Record]) -> str:
    """The events of all runs in order of time; a counted event is placed where it first happened."""
    events = sorted(
        ((record.name, event) for record in records for event in record.history.events()), key=lambda e: e[1].time
    )
    unreadable = sum(record.history.unreadable for record in records)
    note = f'<p class="warning">{unreadable} lines of the logs could not be read.</p>' if unreadable else ""
    rows = [[_clock(e.time), name, _steps(e), e.kind, _said(e)] for name, e in events]
    kinds = [f"kind-{event.kind.replace(' ', '-')}" for _, event in events]
    return note + _table(["time", "run", "step", "event", "what"], rows, kinds) if rows else note


def _steps(event: Event) -> str:
    return f"{event.step:,}" if event.step == event.last else f"{event.step:,} to {event.last:,}"


def _said(event: Event) -> str:
    return f"{event.count:,} x {event.text}" if event.count > 1 or event.kind == "skip" else event.text


def _starts(records: Sequence[Record]) -> str:
    rows = [
        [
            record.name,
            str(start.get("time", "")),
            f"{str(start.get('commit') or '')[:12]}{' + changes' if start.get('changed') else ''}",
            f"{start.get('ranks', '')} on {start.get('host', '')}, {start.get('device', '')}",
            _packages(start),
            str(start.get("command", "")),
        ]
        for record in records
        for start in record.starts
    ]
    return _table(["run", "time", "commit", "ranks", "packages", "command"], rows) if rows else ""


def _packages(start: dict[str, Any]) -> str:
    found = start.get("packages")
    versions = found if isinstance(found, dict) else {}
    known = [f"{name} {versions[name]}" for name in _PACKAGES if name in versions]
    return ", ".join([f"Python {start.get('python', '?')}", *known])


def _has_pictures(records: Iterable[Record]) -> bool:
    return any(record.pictures for record in records)


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>{content}</section>' if content else ""


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = (), numeric: int | None = None
) -> str:
    """A table with escaped cells. classes: the CSS class of each row. numeric: the first column that holds numbers."""

    def cells(tag: str, values: Sequence[str]) -> str:
        right = len(values) if numeric is None else numeric
        return "".join(
            f"<{tag}{' class=number' if column >= right else ''}>{escape(value)}</{tag}>"
            for column, value in enumerate(values)
        )

    names = classes or [""] * len(rows)
    body = "".join(f'<tr class="{escape(name)}">{cells("td", row)}</tr>' for name, row in zip(names, rows, strict=True))
    return f'<div class="scroll"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    return f"{days:.1f} days" if days >= 2 else f"{hours:.1f} h" if hours >= 1 else f"{minutes:.1f} min"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
