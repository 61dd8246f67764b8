"""Stores results: JSON in the run's folder, a table in the terminal, Weights & Biases."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dico_t2i.files import write_atomically
from evals.quality.metrics import LABELS


def result_path(folder: Path, protocol: str, step: int) -> Path:
    return folder / protocol / f"{step:08d}.json"


def write_result(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


def print_result(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the numbers, what they depend on, and whether they are comparable with others."""
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    console.print(result_table(result))
    for key, value in result["sources"].items():
        console.print(f"{key}: {value}", markup=False, highlight=False, soft_wrap=True)
    for line in [f"changed: {change}" for change in result["changes"]] + result["doubts"]:
        console.print(f"not comparable: {line}", style="bold red", markup=False, soft_wrap=True)
    if result.get("seconds"):
        console.print(_shares(result), markup=False, highlight=False, soft_wrap=True)


def result_table(result: dict[str, Any]) -> Table:
    protocol, numbers, errors = result["protocol"], result["numbers"], result["standard_errors"]
    table = Table(
        "metric", "value", "standard error", "spread of parts", title=f"{result['subject']}, {result['images']} images"
    )
    table.caption = f"{protocol['name']} {result['protocol_hash']}" + (
        "" if result["comparable"] else ", NOT COMPARABLE"
    )
    for key, name in LABELS.items():
        if key in numbers:
            spread = numbers.get(f"{key}_std")
            table.add_row(name, f"{numbers[key]:.6f}", _short(errors.get(key)), _short(spread))
    return table


def _shares(result: dict[str, Any]) -> str:
    seconds = result["seconds"]
    total = sum(seconds.values())
    parts = ", ".join(f"{name} {value:.1f} s ({value / total:.0%})" for name, value in seconds.items())
    return f"time of all ranks: {parts}; peak memory of rank 0 {result['peak_memory_gb']:.2f} GB"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
