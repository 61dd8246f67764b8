"""Submits jobs through submitit. A job is a callable that runs once, on the first of its nodes.

<folder>/
  <job>_submission.sh     the script that sbatch received
  <job>_0_log.out         the job's log: its starts, failures and decisions
  <job>/                  files written by the job itself (rank-0.log, ... for the ranks of a run)
  submitted.jsonl         one line for each submission
"""

import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.core.core import Executor
from submitit.local.local import LocalExecutor
from submitit.slurm.slurm import SlurmExecutor

from cluster import slurm
from dico_t2i.config import ClusterConfig
from dico_t2i.runs.decisions import minutes
from dico_t2i.runs.log import append, json_lines

ROOT = Path(__file__).resolve().parents[1]
Work = Callable[[], Any]


@dataclass(frozen=True)
class Submitted:
    """A job that was submitted."""

    id: str
    folder: Path
    local: bool

    @property
    def log(self) -> Path:
        """The path of the job's own log."""
        return self.folder / f"{self.id}_0_log.out"


class _SlurmExecutor(SlurmExecutor):
    """Can also write scripts on machines without SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def executor(
    cluster: ClusterConfig, name: str, folder: Path, *, local: bool, lead_s: int, ranks: bool, after: str | None = None
) -> Executor:
    """An executor that submits to SLURM, or runs jobs on this machine, with the options of ``cluster``.

    ranks: whether the job has cluster.ranks processes; otherwise it has one, with a GPU if the nodes have any. after:
    the job that must succeed before this one starts. Raises ConfigError for an impossible time limit.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    limit = minutes(cluster.time)
    gpus = cluster.gpus_per_node if ranks else min(1, cluster.gpus_per_node)
    setup = [f"export PYTHONPATH={shlex.quote(str(ROOT))}:$PYTHONPATH", *cluster.setup]
    outside = shlex.quote(sys.executable)  # outside the container, which only the ranks use
    python = outside if cluster.container else cluster.python or outside
    made: Executor
    if local:
        made = LocalExecutor(folder, max_num_timeout=10**9, python=python)
        made.update_parameters(timeout_min=limit, signal_delay_s=lead_s, gpus_per_node=gpus, setup=setup)
        return made
    made = _SlurmExecutor(folder, max_num_timeout=10**9, python=python)
    wanted = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "mem": cluster.mem,
        "exclusive": cluster.exclusive or None,
        "gpus_per_node": gpus or None,
        "dependency": f"afterok:{after}" if after else None,
    }
    made.update_parameters(
        job_name=name,
        time=limit,
        nodes=cluster.nodes if ranks else 1,
        ntasks_per_node=cluster.ranks_per_node if ranks else 1,
        cpus_per_task=cluster.cpus_per_task,
        signal_delay_s=lead_s,
        stderr_to_stdout=True,
        use_srun=False,
        setup=setup,
        additional_parameters=_further({"requeue": True, **cluster.sbatch}),
        **{key: value for key, value in wanted.items() if value is not None},
    )
    return made


def _further(options: Mapping[str, str | bool]) -> dict[str, str | bool]:
    """Options of sbatch in submitit's spelling, without those that are false."""
    return {key.replace("-", "_"): value for key, value in options.items() if value is not False}


def submit(made: Executor, works: Sequence[Work], parallel: int | None = None) -> list[Submitted]:
    """Submit one job, or an array of jobs of which at most ``parallel`` run at a time."""
    local = isinstance(made, LocalExecutor)
    if parallel and not local:
        made.update_parameters(array_parallelism=parallel)
    if len(works) == 1:
        handed = [made.submit(works[0])]
    else:
        with made.batch():
            handed = [made.submit(work) for work in works]
    return [Submitted(job.job_id, made.folder, local) for job in handed]


def note(folder: Path, job: Submitted, command: str) -> None:
    """Record a job in its run's folder of jobs."""
    folder.mkdir(parents=True, exist_ok=True)
    line = {"job": job.id, "local": job.local, "time": time.time(), "command": command}
    append(folder / "submitted.jsonl", line)


def script(made: Executor, path: Path) -> Path:
    """Write the script that ``submit`` would give to sbatch."""
    assert isinstance(made, SlurmExecutor)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made._make_submission_file_text(made._submitit_command_str, path.stem))
    path.chmod(0o755)
    return path


def known(folder: Path) -> list[str]:
    """The ids of the SLURM jobs recorded in a run's folder of jobs, oldest first."""
    return [line["job"] for line in json_lines(folder / "submitted.jsonl") if not line["local"]]


def own_id() -> str:
    """The id of the job that this process belongs to: SLURM's, with the task of an array, or the local one."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID") or os.environ["SUBMITIT_LOCAL_JOB_ID"]


def in_slurm() -> bool:
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def check(made: Executor, cluster: ClusterConfig, nodes: int, path: Path) -> None:
    """Have SLURM check the job before anything is queued. Raises SlurmError if it refuses the job."""
    slurm.require()
    slurm.check_partition(cluster.partition, nodes)
    slurm.test_only(script(made, path))
