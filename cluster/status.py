"""List runs: state, step, speed, time left, age of the last checkpoint, restarts.

python cluster/status.py                     all runs in runs/
python cluster/status.py runs/dico_h_t2i     one
python cluster/status.py --json              for programs
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from cluster import slurm
from cluster.jobs import known
from cluster.state import RunState, read_state
from dico_t2i.command import run, script_parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders (default: all of --folder)")
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    folders = arguments.runs or _runs(arguments.folder)
    missing = [folder for folder in folders if not _is_run(folder)]
    if missing:
        raise ValueError(f"{missing[0]}: no run is there")
    rows = [(read_state(folder), _job(folder)) for folder in folders]
    if arguments.json:
        print(
            json.dumps(
                [
                    {**asdict(state), "job": job.id if job else None, "job_state": job.state if job else None}
                    for state, job in rows
                ]
            )
        )
        return 0
    console = Console()
    console.print(_table(rows))
    for state, _ in rows:
        if state.trouble:
            console.print(f"{state.name}: last failure at {state.trouble}", highlight=False, markup=False)
    return 0


def _runs(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give --folder, or run folders")
    return sorted(path for path in folder.iterdir() if _is_run(path))


def _is_run(folder: Path) -> bool:
    """Whether a run is there, or was submitted."""
    return (folder / "config.yaml").exists() or (folder / "jobs" / "submitted.jsonl").exists()


def _job(folder: Path) -> slurm.Job | None:
    """The newest job of a run, if SLURM is here and remembers it."""
    ids = known(folder / "jobs")
    if not ids or not slurm.present():
        return None
    return next(iter(slurm.jobs(ids[-1:])), None)


def _table(rows: Sequence[tuple[RunState, slurm.Job | None]]) -> Table:
    table = Table("run", "state", "step", "loss", "images/s", "left", "saved", "restarts", "job")
    for state, job in rows:
        table.add_row(
            state.name,
            _word(state, job),
            f"{state.step}/{state.steps}" if state.steps else str(state.step),
            _number(state.loss, "{:.4f}"),
            _number(state.images_per_s, "{:.0f}"),
            _clock(state.eta_s) if state.word != "done" else "",
            f"{_clock(state.checkpoint_age_s)} ago" if state.checkpoint_age_s is not None else "never",
            str(state.restarts),
            f"{job.id} {job.state} {job.nodes}".strip() if job else "",
        )
    return table


def _word(state: RunState, job: slurm.Job | None) -> str:
    """A job that waits in the queue will go on by itself."""
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
