"""Shows a job's log and that of rank 0 while they grow, without affecting the job."""

import sys
import time
from pathlib import Path

from cluster import slurm
from cluster.jobs import Submitted

_FORGOTTEN_S = 60.0  # a job that the controller has not known for this long is over


def follow(job: Submitted, *logs: Path) -> int:
    """Print the job's own log and others until the job is over; returns 0 if it succeeded, else 1.

    Ctrl-C stops the printing, not the job.
    """
    tails = [_Tail(path) for path in (job.log, *logs)]
    try:
        return _until_over(job, tails)
    except KeyboardInterrupt:
        print(f"\nstopped following; job {job.id} continues", file=sys.stderr)
        return 0


def _until_over(job: Submitted, tails: list["_Tail"]) -> int:
    state, unknown_since = "", time.monotonic()
    while True:
        found = _state(job)
        if found:
            unknown_since = time.monotonic()
        if found and found != state:
            print(f"-- job {job.id}: {found}", file=sys.stderr)
            state = found
        for tail in tails:
            tail.show()
        if state and state.split()[0] not in slurm.ACTIVE:
            return 0 if state == "COMPLETED" else 1
        if time.monotonic() - unknown_since > _FORGOTTEN_S:
            print(f"-- job {job.id}: SLURM no longer knows this job", file=sys.stderr)
            return 1
        time.sleep(1)


def _state(job: Submitted) -> str:
    """The job's state, with the reason if it waits; empty if it is unknown."""
    if job.local:
        return _local_state(job)
    found = slurm.jobs([job.id])
    if not found:
        return ""
    waiting = f" ({found[0].reason})" if found[0].state == "PENDING" and found[0].reason else ""
    return found[0].state + waiting


def _local_state(job: Submitted) -> str:
    """The state of a local job, from its process and the result that it leaves."""
    if Path(f"/proc/{job.id}").exists() and "\nState:\tZ" not in Path(f"/proc/{job.id}/status").read_text():
        return "RUNNING"
    return "COMPLETED" if (job.folder / f"{job.id}_0_result.pkl").exists() else "FAILED"


class _Tail:
    """Prints the new content of a growing file."""

    def __init__(self, path: Path) -> None:
        self.path, self.shown = path, 0

    def show(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.shown)
            new = file.read()
        self.shown += len(new)
        sys.stdout.write(new.decode(errors="replace"))
        sys.stdout.flush()
