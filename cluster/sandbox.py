"""Runs a real SLURM on this machine, for trying jobs and for tests: one controller and any number of node daemons.

    python cluster/sandbox.py start --nodes 2 --cpus 2       then run the printed export SLURM_CONF=...
    python cluster/sandbox.py status
    python cluster/sandbox.py stop

All files are in one folder, the system's own SLURM is not affected, and no special rights are needed. Jobs run as the
user who started the sandbox. CPUs, GPUs and nodes are only counted: all nodes share this machine, and a job may request
more than the machine has. Jobs of partition `main` preempt those of `preemptible`, which are requeued. The programs of
SLURM and munge are needed (Debian: slurm-wlm and munge).
"""

import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dico_t2i.command import run, script_parser

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"  # users' own PATH has no sbin
_PORTS = range(10000, 15000)  # training uses 20000 to 29999, and systems assign ports above 32767
_START_S, _NODE_S, _STOP_S = 60, 10, 20

# cred_expire: the least waiting time of a requeued job; the default is 120 s.
# SlurmdTimeout, MessageTimeout: they determine when a silent node counts as down, here after about 15 s.
_SLURM_CONF = """\
ClusterName=sandbox
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdTimeout=5
MessageTimeout=5
ReturnToService=2
JobRequeue=1
MinJobAge=3600
KillWait={kill_wait}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports}] CPUs={cpus} RealMemory=1000 {gres}
PartitionName=main Nodes=ALL Default=YES PriorityTier=2 PreemptMode=OFF
PartitionName=preemptible Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
"""


class SandboxError(ValueError):
    """Raised if the sandbox cannot do what is requested; the message says why."""


@dataclass(frozen=True)
class Sandbox:
    """A SLURM whose nodes are n1, n2, ... and whose files are all in ``folder``, an absolute path."""

    folder: Path
    nodes: int = 2
    cpus: int = 2  # of each node
    gpus: int = 0  # of each node; they are counted, but jobs see none
    kill_wait: int = 30  # seconds from SIGTERM to SIGKILL when a job is ended

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which SLURM's commands use this sandbox."""
        return {"SLURM_CONF": str(self.conf)}

    @property
    def running(self) -> bool:
        return self._pid("slurmctld") is not None

    def start(self) -> None:
        """Start SLURM, and return when all nodes accept jobs. Job numbers continue from earlier starts.

        Raises SandboxError if it does not start.
        """
        self._check()
        self.stop()  # ends leftover processes of a sandbox whose controller has died
        self._write_files()
        try:
            self._start_daemons()
        except SandboxError:
            self.stop()
            raise

    def stop(self) -> None:
        """Cancel all jobs and end every process of the sandbox; does nothing if it is not running."""
        if self.running:
            self.command("scancel", "--user", _user())
        _end(self._steps(), signal.SIGKILL)  # a node's daemon waits for them
        names = {path.stem for path in (self.folder / "run").glob("*.pid")}
        _end([self._pid(name) for name in names - {"munged"}])
        _end(self._steps(), signal.SIGKILL)  # of jobs that started meanwhile
        _end([self._pid("munged")])  # last, since the other daemons need it until they end

    def status(self) -> str:
        """The output of sinfo and squeue."""
        if not self.running:
            return f"no SLURM runs in {self.folder}"
        return f"SLURM runs in {self.folder}\n{self.command('sinfo')}{self.command('squeue')}"

    def kill_node(self, name: str, *, steps: bool = False) -> None:
        """Kill a node's daemon. steps: also kill the processes of its jobs, which otherwise continue."""
        pid = self._pid(name)
        if pid is None:
            raise SandboxError(f"{name}: no such node is running in {self.folder}")
        _end([pid, *(self._steps(name) if steps else [])], signal.SIGKILL)

    def start_node(self, name: str) -> None:
        """Start a node's daemon; returns before the controller has noticed it."""
        self._daemon("slurmd", "-f", str(self.conf), "-N", name)
        if not _within(_NODE_S, lambda: self._pid(name) is not None):
            raise SandboxError(f"{name}: slurmd ended immediately, see {self.folder}/log/{name}.log")

    def kill_controller(self) -> None:
        """Kill the controller; jobs continue, but SLURM's commands get no answer."""
        _end([self._pid("slurmctld")], signal.SIGKILL)

    def start_controller(self) -> None:
        """Start the controller; it continues with the jobs that it knew."""
        self._daemon("slurmctld", "-f", str(self.conf))

    def job_processes(self, node: str) -> list[int]:
        """The processes of jobs that run on a node, SLURM's own among them."""
        return self._steps(node)

    def command(self, *command: str) -> str:
        """The output of one of SLURM's commands, whether it succeeds or not."""
        return subprocess.run(command, capture_output=True, text=True, env=self._environment(), check=False).stdout

    def _check(self) -> None:
        """Raise SandboxError for requests that cannot work."""
        if missing := missing_programs():
            raise SandboxError(f"not installed: {', '.join(missing)} (Debian: apt-get install slurm-wlm munge)")
        if self.running:
            raise SandboxError(f"a SLURM is already running in {self.folder}; stop it first")
        if not re.fullmatch(r"/[\w./@+-]{1,70}", str(self.folder)):  # paths of sockets have at most 108 characters
            raise SandboxError(f"--folder {self.folder}: use a path of at most 70 letters, digits or ./@+-_")
        if min(self.nodes, self.cpus) < 1 or self.gpus < 0:
            raise SandboxError(f"{self.nodes} nodes of {self.cpus} CPUs and {self.gpus} GPUs: use at least 1, 1 and 0")

    def _write_files(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        for name in ("run", "log", "state", "spool", "gpus"):
            (self.folder / name).mkdir(mode=0o755, exist_ok=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        devices = [self.folder / "gpus" / str(number) for number in range(self.gpus)]
        for device in devices:
            device.touch()
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))
        controller_port, *ports = _free_ports(1 + self.nodes)
        text = _SLURM_CONF.format(
            **{"host": socket.gethostname().partition(".")[0], "user": _user(), "folder": self.folder},
            **{"controller_port": controller_port, "ports": ",".join(map(str, ports)), "kill_wait": self.kill_wait},
            **{"nodes": self.nodes, "cpus": self.cpus, "gres": f"Gres=gpu:{self.gpus}" if self.gpus else ""},
        )
        self.conf.write_text(text)

    def _start_daemons(self) -> None:
        files = {"key-file": "munge.key", "log-file": "log/munged.log"}
        files |= {"socket": "run/munge.socket", "pid-file": "run/munged.pid", "seed-file": "run/munge.seed"}
        # --force: munge would refuse a folder that other users cannot enter
        self._daemon("munged", "--force", *(f"--{option}={self.folder / path}" for option, path in files.items()))
        self.start_controller()
        for number in range(1, self.nodes + 1):
            self.start_node(f"n{number}")
        if not _within(_START_S, self._ready):
            raise SandboxError(f"SLURM is not ready after {_START_S} s; {self._last_words()}")

    def _ready(self) -> bool:
        states = self.command("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").split()
        return len(states) == self.nodes and set(states) <= {"idle", "mixed", "allocated"}

    def _last_words(self) -> str:
        """The last lines of the logs."""
        logs = [self.folder / "log" / f"{name}.log" for name in ("munged", "slurmctld", "n1")]
        ends = [(log, log.read_text(errors="replace").splitlines()[-8:]) for log in logs if log.exists()]
        return "\n".join(f"{log} ends with\n  " + "\n  ".join(lines) for log, lines in ends)

    def _daemon(self, program: str, *arguments: str) -> None:
        """Start a daemon; returns when it runs in the background."""
        command = [shutil.which(program, path=_PATH) or program, *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, env=self._environment(), check=False)
        if answer.returncode:
            raise SandboxError(f"{program} does not start: {answer.stderr.strip()}; {self._last_words()}")

    def _environment(self) -> dict[str, str]:
        """The caller's environment, without variables of a different SLURM."""
        clean = {key: value for key, value in os.environ.items() if not re.match("SLURM|SBATCH_|SQUEUE_|SINFO_", key)}
        return {**clean, **self.environment}

    def _pid(self, daemon: str) -> int | None:
        """The process id of a running daemon, else None; an old file's id may now be that of a different process."""
        try:
            pid = int((self.folder / "run" / f"{daemon}.pid").read_text())
        except (OSError, ValueError):
            return None
        return pid if f"{self.folder}/".encode() in _read(pid, "cmdline") else None

    def _steps(self, node: str = r"n\d+") -> list[int]:
        """The processes of jobs on a node: slurmstepd has the node's log open, its children have the node's name."""
        name = re.compile(rf"\0SLURMD_NODENAME={node}\0".encode())
        conf = f"\0SLURM_CONF={self.conf}\0".encode()
        log = re.compile(rf"{re.escape(str(self.folder))}/log/{node}\.log")

        def belongs(pid: int) -> bool:
            if _read(pid, "comm").startswith(b"slurmstepd"):
                return any(map(log.fullmatch, _open_files(pid)))
            environment = b"\0" + _read(pid, "environ")
            return conf in environment and name.search(environment) is not None

        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if belongs(int(path.name))]


def missing_programs() -> list[str]:
    """The programs of SLURM and munge that are not on this machine."""
    return [program for program in _PROGRAMS if not shutil.which(program, path=_PATH)]


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise SandboxError(f"user {os.getuid()} has no name in /etc/passwd, but SLURM needs one") from None


def _free_ports(count: int) -> list[int]:
    return list(islice(filter(_is_free, random.sample(_PORTS, len(_PORTS))), count))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _end(pids: Iterable[int | None], number: int = signal.SIGTERM) -> None:
    """Signal the processes and wait for their end; those that do not end are killed."""
    left = [pid for pid in pids if pid is not None]
    for what in (number, signal.SIGKILL):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, what)
        left = _left_after(_STOP_S, left)


def _left_after(seconds: float, pids: Sequence[int]) -> list[int]:
    """The processes that still run after this time; returns early if none do. A zombie has no command line."""
    _within(seconds, lambda: not any(_read(pid, "cmdline") for pid in pids))
    return [pid for pid in pids if _read(pid, "cmdline")]


def _within(seconds: float, happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not (result := happened()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return result


def _read(pid: int, name: str) -> bytes:
    """A file of /proc; empty if the process has ended or belongs to a different user."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _open_files(pid: int) -> list[str]:
    try:
        return [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:  # the process has ended or belongs to a different user
        return []


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    default = Path(os.environ.get("DICO_SLURM_SANDBOX", Path.home() / ".cache/dico_t2i/slurm"))
    parser.add_argument("action", choices=("start", "stop", "status"), help="what to do with the sandbox")
    parser.add_argument("--nodes", type=int, default=Sandbox.nodes, help="number of nodes (default: %(default)s)")
    parser.add_argument("--cpus", type=int, default=Sandbox.cpus, help="CPUs of each node (default: %(default)s)")
    parser.add_argument(
        "--gpus",
        type=int,
        default=Sandbox.gpus,
        help="GPUs of each node (default: 0); jobs can request them, but see none",
    )
    parser.add_argument(
        "--folder", type=Path, default=default, help="its folder (default: $DICO_SLURM_SANDBOX, or %(default)s)"
    )
    arguments = parser.parse_args(argv)
    folder = arguments.folder.expanduser().resolve()
    sandbox = Sandbox(folder, arguments.nodes, arguments.cpus, arguments.gpus)
    if arguments.action == "start":
        sandbox.start()
        print(f"SLURM is running with {sandbox.nodes} nodes. To use it, and to stop it:\n")
        print(f"export SLURM_CONF={sandbox.conf}\npython {sys.argv[0]} stop --folder {folder}")
    elif arguments.action == "stop":
        sandbox.stop()
    print(sandbox.status())
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
