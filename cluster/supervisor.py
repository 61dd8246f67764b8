"""The training job on its first node: starts the ranks, waits for them, and decides what to do next.

SLURM sends its signals (before the time limit, at preemption) to the ranks themselves. They save and exit with the
requeue code; then this process requests the requeue. Ranks that are killed leave no note; what srun and the other ranks
report about them is shown instead.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from cluster import jobs, preflight, slurm
from cluster.rank import START_MARK
from cluster.state import last_step, tail
from dico_t2i.command import REQUEUE_EXIT_CODE
from dico_t2i.config import ClusterConfig, load_config
from dico_t2i.runs.decisions import Failure, counts, decide
from dico_t2i.runs.log import append, json_lines

_PORTS = range(20000, 30000)  # outside the range of ports that systems assign
_STRAGGLERS_S = 300  # from the end of the first rank until srun ends the others


@dataclass(frozen=True)
class TrainJob:
    """The callable that is submitted. It ends with exit code 0 if the run is done, and 1 if it is given up."""

    name: str
    config: str  # resolved, as YAML
    runs: str
    command: str  # the user's command line

    def __call__(self) -> None:
        Supervisor(self).run()


class Supervisor:
    """Runs one job, from the check of its nodes to its end."""

    def __init__(self, job: TrainJob) -> None:
        self.job, self.id, self.slurm = job, jobs.own_id(), jobs.in_slurm()
        self.run_folder = Path(job.runs) / job.name
        self.folder = self.run_folder / "jobs" / self.id
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(job.config)
        cluster = load_config(self.folder / "config.yaml").cluster
        # A job that waits may have been given another number of nodes (scontrol update NumNodes=...).
        nodes = int(os.environ["SLURM_JOB_NUM_NODES"]) if self.slurm else cluster.nodes
        self.cluster = cluster.model_copy(update={"nodes": nodes})
        self.start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.ranks: list[subprocess.Popen[bytes]] = []

    def run(self) -> None:
        """Start the ranks, and start them again after failures and stops if ``decide`` says so."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._pass_on)
        self._check_nodes()
        while True:
            code = self._train()
            failure, taken = self._failure(code), self._taken_away()
            if failure and counts(failure, bool(taken)):
                self._record(failure)
            if taken:
                say(taken)
                sys.exit(1)
            decision = decide(code, self.start, self.cluster.max_requeues, self._failures())
            say(decision.why)
            if decision.act == "end":
                return
            if decision.act == "give up" or (code == REQUEUE_EXIT_CODE and not self.slurm):
                sys.exit(1)
            if self.slurm:
                self._requeue()
            self.start += 1

    def _train(self) -> int:
        """Start all ranks and wait for them; returns the highest exit code."""
        environment = self._environment()
        address = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        where = os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())
        say(f"start {self.start} of job {self.id}: {self.cluster.ranks} ranks on {where}, rendezvous at {address}")
        command = ["-u", "-m", "cluster.rank", str(self.folder), self.job.runs, str(self.start)]
        if self.slurm:
            return self._under_srun(command, environment)
        return self._here(command, environment)

    def _under_srun(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        cluster = self.cluster
        tasks = ["--ntasks", str(cluster.ranks), "--ntasks-per-node", str(cluster.ranks_per_node)]
        output = ["--unbuffered", "--open-mode=append", f"--output={self.folder}/rank-%t.log"]
        ending = ["--kill-on-bad-exit=0", f"--wait={_STRAGGLERS_S}"]  # ranks that are saving must not be killed
        srun = [*_srun(cluster), *tasks, f"--cpus-per-task={cluster.cpus_per_task}", *output, *ending]
        with (self.folder / "srun.log").open("ab", buffering=0) as log:
            log.write(f"{START_MARK}{self.start}\n".encode())
            done = subprocess.run([*srun, _python(cluster), *command], env=environment, stderr=log, check=False)
        return done.returncode

    def _here(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        size = self.cluster.ranks
        for rank in range(size):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            with (self.folder / f"rank-{rank}.log").open("ab") as log:
                process = subprocess.Popen([_python(self.cluster), *command], env=own, stdout=log, stderr=log)
            self.ranks.append(process)
        codes = [process.wait() for process in self.ranks]
        self.ranks.clear()
        codes = [128 - code if code < 0 else code for code in codes]
        return max(codes)

    def _environment(self) -> dict[str, str]:
        first = slurm.first_host(os.environ["SLURM_JOB_NODELIST"]) if self.slurm else "127.0.0.1"
        return {
            "OMP_NUM_THREADS": str(max(1, self.cluster.cpus_per_task // 2)),
            **os.environ,
            "MASTER_ADDR": first,
            "MASTER_PORT": str(_free_port()),
            "DICO_LAUNCHED_BY": self.job.command,
            **{key: str(value) for key, value in self.cluster.env.items()},
        }

    def _check_nodes(self) -> None:
        """Give up, before any rank starts, if the nodes lack something that training needs, or differ."""
        gpus = self.cluster.gpus_per_node
        if self.slurm:
            command = [*_srun(self.cluster), f"--ntasks={self.cluster.nodes}", "--ntasks-per-node=1"]
            command += [_python(self.cluster), "-m", "cluster.preflight", str(self.folder), str(gpus)]
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
            nodes = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]
            found = [] if len(nodes) == self.cluster.nodes else [f"a node does not answer: {answer.stderr.strip()}"]
        else:
            nodes, found = [preflight.inspect(self.folder, gpus)], []
        found += preflight.problems(nodes, gpus)
        if found:
            say("the nodes cannot run this job:", *found)
            sys.exit(1)

    def _failure(self, code: int) -> Failure | None:
        """The failure that a rank noted first, or else a description of ranks that were killed."""
        notes = [json.loads(path.read_text()) for path in (self.folder / f"errors-{self.start}").glob("*.json")]
        if not notes and code in (0, REQUEUE_EXIT_CODE):
            return None
        step = last_step(self.run_folder)
        if not notes:
            return Failure(time.time(), self.id, self.start, step, code, None, "", self._last_words(code))
        first = min(notes, key=lambda note: note["time"])
        return Failure(job=self.id, start=self.start, step=step, **first)

    def _last_words(self, code: int) -> str:
        """The reports of srun and of hang detection about ranks that left no note."""
        lines = [line for path in self.folder.glob("rank-*.log") for line in _newest(path) if line.startswith("[hang]")]
        verdicts = sorted(
            {re.sub(r"^\[hang\] (rank \d+: )?|; its own main thread is at:$", "", line) for line in lines}
        )
        reports = [line for line in _newest(self.folder / "srun.log") if "error" in line][-4:]
        ending = f"signal {signal.Signals(code - 128).name}" if code - 128 in set(signal.Signals) else f"code {code}"
        hint = " (the kernel sends it when a node is out of memory)" if code == 128 + signal.SIGKILL else ""
        return "\n".join([f"ranks ended by {ending}{hint}, without a traceback", *verdicts[:3], *reports])

    def _record(self, failure: Failure) -> None:
        append(self.run_folder / "failures.jsonl", asdict(failure))
        who = "" if failure.rank is None else f" rank {failure.rank} on {failure.host}:"
        say(f"FAILED at step {failure.step}:{who}", failure.error)

    def _failures(self) -> list[Failure]:
        """The failures of this job, oldest first."""
        return [Failure(**line) for line in json_lines(self.run_folder / "failures.jsonl") if line["job"] == self.id]

    def _requeue(self) -> NoReturn:
        """Put the job back into the queue, and end."""
        say("requeued: the job resumes when SLURM starts it again")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the requeue sends it, which ends this process
        slurm.requeue(self.id)
        time.sleep(60)
        sys.exit(1)

    def _taken_away(self) -> str:
        """A description of what SLURM has done with the job; empty while the job may run."""
        for found in slurm.jobs([self.id]) if self.slurm else []:
            if found.state == "RUNNING":
                return ""
            if found.restarts > self.start or found.state in ("PENDING", "REQUEUED"):
                return "requeued by SLURM (scontrol requeue, preemption or a lost node): resumes from its checkpoint"
            if found.reason in ("TimeLimit", "NodeDown") or found.state in ("TIMEOUT", "NODE_FAIL"):
                return f"ended by SLURM ({found.reason or found.state}); launch again to resume"
            return "cancelled (scancel); launch again to resume from the newest checkpoint"
        return ""

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on to local ranks; under SLURM the ranks receive signals themselves."""
        for process in self.ranks:
            process.send_signal(number)


def say(*lines: str) -> None:
    """Write to the job's log."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"[{stamp}] " + "\n".join(lines), flush=True)


def _newest(log: Path) -> list[str]:
    """The last lines of a log, only those of its last start."""
    lines = tail(log)
    marks = [number for number, line in enumerate(lines) if line.startswith(START_MARK)]
    return lines[marks[-1] :] if marks else lines


def _srun(cluster: ClusterConfig) -> list[str]:
    options = [f"--cpu-bind={cluster.cpu_bind}"] if cluster.cpu_bind else []
    if cluster.container:
        mounts = ",".join((f"{jobs.ROOT}:{jobs.ROOT}", *cluster.container_mounts))
        options += [f"--container-image={cluster.container}", f"--container-mounts={mounts}"]
        options += [f"--container-workdir={Path.cwd()}"]
    return ["srun", *options, *cluster.srun]


def _python(cluster: ClusterConfig) -> str:
    return cluster.python or sys.executable


def _free_port() -> int:
    """A port of this node, for rank 0 to listen on, that is free now."""
    for port in random.sample(_PORTS, 200):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port from {_PORTS.start} to {_PORTS.stop - 1} on {socket.gethostname()}")
