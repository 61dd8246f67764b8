"""Results of the judges: what they depend on, a table for the terminal, and JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dico_t2i.files import write_atomically
from evals.quality.protocol import digest
from evals.real.judges import Verdict

COLUMNS = ("judge", "value", "95 % interval", "real pictures", "control", "about")


def row(verdict: Verdict) -> list[str]:
    """A verdict as text, in the order of COLUMNS."""
    low, high = verdict.interval
    numbers = [verdict.value, verdict.real, verdict.control]
    shown = ["" if number is None else f"{number:.4g}" for number in numbers]
    return [verdict.name, shown[0], f"{low:.4g} to {high:.4g}", *shown[1:], verdict.about]


def write_results(path: Path, subject: str, protocol: Mapping[str, Any], verdicts: Sequence[Verdict]) -> None:
    """Print the table, and write the verdicts with their protocol and its hash."""
    key = digest(protocol)
    table = Table(*COLUMNS, title=subject, caption=f"protocol {key}")
    for verdict in verdicts:
        table.add_row(*row(verdict))
    console = Console()
    console.width = max(console.width, 150)
    console.print(table)
    content = {
        "subject": subject,
        "protocol": dict(protocol),
        "protocol_hash": key,
        "verdicts": [verdict._asdict() for verdict in verdicts],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def read_verdicts(path: Path) -> list[Verdict]:
    """The verdicts of a file of results."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return [Verdict(**{**entry, "interval": tuple(entry["interval"])}) for entry in content["verdicts"]]
