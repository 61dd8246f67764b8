"""Runs SLURM's own commands, and turns their errors into one-line messages."""

import re
import shutil
import socket
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STAGE_OUT"}


class SlurmError(ValueError):
    """Raised if SLURM is missing or refuses a request; the message says what to change."""


@dataclass(frozen=True)
class Job:
    """A job in the controller's records."""

    id: str
    state: str  # PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, CANCELLED, NODE_FAIL ...
    nodes: str  # such as "n[1-2]"; empty while the job waits
    reason: str
    restarts: int

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def present() -> bool:
    """Whether SLURM's commands are on this machine."""
    return shutil.which("sbatch") is not None and shutil.which("scontrol") is not None


def answers() -> bool:
    """Whether SLURM is on this machine and its controller answers."""
    return present() and "UP" in _run("scontrol", "ping", check=False).stdout


def require() -> None:
    """Raise SlurmError if this machine cannot submit jobs."""
    if not present():
        raise SlurmError("no SLURM here (sbatch is not on PATH): launch from a login node, or use --local")
    if not answers():
        raise SlurmError("SLURM's controller does not answer (scontrol ping): try again later, or check SLURM_CONF")


def check_partition(partition: str | None, nodes: int) -> None:
    """Raise SlurmError if the partition (None is the default one) does not exist or has fewer nodes."""
    sizes: dict[str, int] = {}
    default = None
    for line in _run("sinfo", "--noheader", "--format=%P %D").stdout.splitlines():
        name, count = line.split()
        default = name.rstrip("*") if name.endswith("*") else default
        sizes[name.rstrip("*")] = sizes.get(name.rstrip("*"), 0) + int(count)
    wanted = partition or default
    if wanted is None:
        raise SlurmError(f"there is no default partition: set --partition to one of {', '.join(sorted(sizes))}")
    if wanted not in sizes:
        raise SlurmError(f"--partition {wanted}: no such partition; there are {', '.join(sorted(sizes))}")
    if nodes > sizes[wanted]:
        raise SlurmError(f"--nodes {nodes}: partition {wanted} has {sizes[wanted]} nodes; ask for fewer")


def test_only(script: Path) -> None:
    """Have sbatch check a script without queueing it. Raises SlurmError with its reason."""
    answer = _run("sbatch", "--test-only", str(script), check=False)
    if answer.returncode:
        reasons = re.sub(r"sbatch: error: |allocation failure: |Batch job submission failed: ", "", answer.stderr)
        raise SlurmError(f"SLURM refuses the job: {'; '.join(reasons.strip().splitlines())}")


def jobs(ids: Iterable[str]) -> list[Job]:
    """The jobs of these ids that the controller still has on record."""
    return [job for id in ids for job in [_job(id)] if job]


def requeue(job: str) -> None:
    """Put a running job back into the queue. Raises SlurmError if SLURM refuses."""
    answer = _run("scontrol", "requeue", job, check=False)
    if answer.returncode:
        raise SlurmError(f"SLURM refuses to requeue job {job}: {answer.stderr.strip()}")


def first_host(nodes: str) -> str:
    """The address of the first node in a list such as "n[1-4]": its name if it resolves, else SLURM's address."""
    name = _run("scontrol", "show", "hostnames", nodes).stdout.split()[0]
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return _field(_run("scontrol", "show", "node", name).stdout, "NodeAddr")
    return name


def _job(id: str) -> Job | None:
    answer = _run("scontrol", "show", "job", "--oneliner", id, check=False)
    text = answer.stdout.strip()
    if answer.returncode or not text:
        return None
    text = text.splitlines()[0]
    nodes, restarts = _field(text, "NodeList"), _field(text, "Restarts")
    reason = _field(text, "Reason")
    return Job(
        id,
        _field(text, "JobState"),
        "" if nodes in ("(null)", "") else nodes,
        "" if reason == "None" else reason,
        int(restarts or 0),
    )


def _field(text: str, name: str) -> str:
    """The value of "Name=value" in the output of scontrol; empty if there is none."""
    found = [word.partition("=")[2] for word in text.split() if word.startswith(f"{name}=")]
    return found[0] if found else ""


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    answer = _call(command)
    if check and answer.returncode:
        raise SlurmError(f"{' '.join(command)}: {answer.stderr.strip()}")
    return answer


def _call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not on PATH: SLURM's commands are needed here") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{' '.join(command)}: no answer in 60 s; SLURM's controller is busy or unreachable") from None
