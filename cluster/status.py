"""List runs: state, step, speed, time left, age of the last checkpoint, restarts.

python cluster/status.py                     all runs in runs/
python cluster/status.py runs/dico_h_t2i     one
python cluster/status.py --json              for programs
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from cluster import slurm
from cluster.jobs import known
from cluster.state import RunState, read_state, unreadable
from dico_t2i.command import USER_ERROR, run, script_parser

Row = tuple[RunState, slurm.Job | None]
_COLUMNS = ("run", "state", "step", "stage", "loss", "images/s", "left", "saved", "restarts", "job")
_DROPPED = ("restarts", "loss", "saved", "job", "images/s", "left")  # hidden in this order if the terminal is narrow


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders (default: all of --folder)")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where run folders are (default: runs)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    folders = arguments.runs or _runs(arguments.folder)
    missing = [folder for folder in folders if not _is_run(folder)]
    rows = [_row(folder) for folder in folders if folder not in missing]
    if arguments.json:
        jobs = [{"job": job.id if job else None, "job_state": job.state if job else None} for _, job in rows]
        print(json.dumps([{**asdict(state), **job} for (state, _), job in zip(rows, jobs, strict=True)]))
    elif rows:
        _show(rows)
    for folder in missing:
        print(f"error: {folder}: no such run", file=sys.stderr)
    return USER_ERROR if missing else 0


def _show(rows: Sequence[Row]) -> None:
    """Print the table, as wide as the terminal; without a terminal, as wide as it needs."""
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 1000)
    dropped: list[str] = []
    anything = console.options.update(width=10_000)
    while len(dropped) < len(_DROPPED):
        if console.measure(_table(rows, dropped), options=anything).maximum <= console.width:
            break
        dropped.append(_DROPPED[len(dropped)])
    console.print(_table(rows, dropped))
    if dropped:
        print(f"not shown in this narrow terminal: {', '.join(dropped)} (--json shows all)")
    for state, _ in rows:
        if state.trouble:
            console.print(f"{state.name}: last failure at {state.trouble}", highlight=False, markup=False)


def _row(folder: Path) -> Row:
    """The state of a run and its job; a folder that cannot be read has a row, too."""
    try:
        return read_state(folder), _job(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        return unreadable(folder, str(why)), None


def _runs(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; use --folder, or name run folders")
    return sorted(path for path in folder.iterdir() if _is_run(path))


def _is_run(folder: Path) -> bool:
    """Whether the folder is a run, or of a submitted one; a folder without permission to read counts as a run."""
    try:
        return (folder / "config.yaml").exists() or (folder / "jobs" / "submitted.jsonl").exists()
    except PermissionError:
        return True


def _job(folder: Path) -> slurm.Job | None:
    """The newest job of a run, if SLURM is on this machine and still has it on record."""
    ids = known(folder / "jobs")
    if not ids or not slurm.present():
        return None
    return next(iter(slurm.jobs(ids[-1:])), None)


def _table(rows: Sequence[Row], without: Sequence[str]) -> Table:
    """The table; long names are folded over several lines and never cut."""
    columns = [column for column in _COLUMNS if column not in without]
    if not any(state.stage for state, _ in rows):
        columns.remove("stage")
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("state", "step"))
    for state, job in rows:
        cells = {
            "run": escape(state.name),
            "state": _word(state, job),
            "step": f"{state.step}/{state.steps}" if state.steps else str(state.step),
            "stage": escape(state.stage),
            "loss": _number(state.loss, "{:.4f}"),
            "images/s": _number(state.images_per_s, "{:.0f}"),
            "left": _clock(state.eta_s) if state.word != "done" else "",
            "saved": f"{_clock(state.checkpoint_age_s)} ago" if state.checkpoint_age_s is not None else "never",
            "restarts": str(state.restarts),
            "job": f"{job.id} {job.state} {job.nodes}".strip() if job else "",
        }
        table.add_row(*(cells[column] for column in columns))
    return table


def _word(state: RunState, job: slurm.Job | None) -> str:
    """The word for a run's state; a run whose job waits in the queue is "queued", since it will resume."""
    return "queued" if job and job.state == "PENDING" and state.word != "done" else state.word


def _number(value: float | None, form: str) -> str:
    return form.format(value) if value is not None else ""


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}h" if days else f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"


if __name__ == "__main__":
    sys.exit(run(main))
