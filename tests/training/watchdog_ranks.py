"""Ranks that run a loop of collectives under a watchdog, and what goes wrong in it.

Their watchdogs' clock counts looks in place of seconds, and all ranks look equally often: on a busy machine everything
takes longer, and nothing comes out otherwise.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from subprocess import TimeoutExpired

import torch
import torch.distributed as dist

from dico_t2i.training.ranks.distributed import join_world
from dico_t2i.training.ranks.watchdog import Watchdog
from tests.forkserver import Popen
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S, STEPS, AT = 2.0, 40, 20  # the step at which it goes wrong
LOOK_S = TIMEOUT_S / 10  # from one look of a watchdog's thread to the next


class Clock:
    """In place of ``time`` in the watchdog's module: its thread asks for the time once a look."""

    sleep = staticmethod(time.sleep)

    def __init__(self, folder: Path, rank: int, ranks: int) -> None:
        self.own, self.looks = folder / f"looks-{rank}.txt", 0
        self.others = [folder / f"looks-{other}.txt" for other in range(ranks) if other != rank]

    def monotonic(self) -> float:
        self.looks += 1
        new = self.own.with_suffix(".new")
        new.write_text(f"{os.getpid()} {self.looks}")
        new.rename(self.own)
        while any(self._behind(other) for other in self.others):
            time.sleep(0.002)
        return self.looks * LOOK_S

    def _behind(self, other: Path) -> bool:
        """Whether a rank that runs has looked less often."""
        if not other.exists():
            return True
        pid, looks = other.read_text().split()
        return int(looks) < self.looks and _runs(pid)

    def wait(self, seconds: float) -> None:
        """Until so much has gone by for this process's watchdog."""
        end = self.looks + round(seconds / LOOK_S)
        while self.looks < end:
            time.sleep(0.002)


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "TZX"
    except OSError:
        return False  # it has ended


def sleep_in_data(watchdog, clock, step):
    time.sleep(60)


def wait_for_a_stopped_child(watchdog, clock, step):
    """As a data worker that is stopped with its answer half sent."""
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    (Path(os.environ["FOLDER"]) / "child.txt").write_text(str(child))
    os.kill(child, signal.SIGSTOP)
    os.waitpid(child, 0)


def sleep_in_step(watchdog, clock, step):
    watchdog.beat(step, "step")
    time.sleep(60)


def sleep_in_first_step(watchdog, clock, step):
    if step == 0:
        clock.wait(1.5 * TIMEOUT_S)


def stop(watchdog, clock, step):
    clock.wait(4 * LOOK_S)  # until the others have heard of this step
    os.kill(os.getpid(), signal.SIGSTOP)


def kill(watchdog, clock, step):
    clock.wait(4 * LOOK_S)
    os.kill(os.getpid(), signal.SIGKILL)


def kill_leaving_a_child(watchdog, clock, step):
    """As a data worker does, the child outlives the rank and holds what it inherited."""
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    kill(watchdog, clock, step)


def fail(watchdog, clock, step):
    raise ValueError("shard 7 is gone")


def allow_more(watchdog, clock, step):
    watchdog.beat(step, "save", extra_s=2 * TIMEOUT_S)
    clock.wait(1.5 * TIMEOUT_S)


def go_on_slowly(watchdog, clock, step):
    for _ in range(4):
        watchdog.beat(step, "data")
        clock.wait(0.5 * TIMEOUT_S)


def leave_late(watchdog, clock, step):
    if step == STEPS - 1:
        clock.wait(0.5 * TIMEOUT_S)


SAME_BEATS = {allow_more: 1, go_on_slowly: 4, sleep_in_step: 1}
EVERY_STEP = (sleep_in_first_step, leave_late)


def run_rank(victims, fault):
    torch.set_num_threads(1)
    world = join_world()
    folder, rank, ranks = Path(os.environ["FOLDER"]), world.rank, world.size
    clock = sys.modules[Watchdog.__module__].time = Clock(folder, rank, ranks)

    def note(step, message):
        (folder / f"verdict-{rank}.txt").write_text(f"{step} {message}")

    with Watchdog(world, TIMEOUT_S, 3 * TIMEOUT_S, note) as watchdog:
        for step in range(STEPS):
            watchdog.beat(step, "data")
            if step == AT or fault in EVERY_STEP:
                if rank in victims:
                    fault(watchdog, clock, step)
                else:
                    for _ in range(SAME_BEATS.get(fault, 0)):
                        watchdog.beat(step, "step")
            watchdog.beat(step, "step")
            dist.all_reduce(torch.ones(1))
    print("done")
    sys.stdout.flush()
    os._exit(0)


class Ranks:
    """Ranks as processes."""

    def __init__(self, folder: Path, ranks: int, victims: tuple[int, ...], fault) -> None:
        self.folder = folder
        place = {"FOLDER": str(folder), "WORLD_SIZE": str(ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [sys.executable, "-m", __name__, fault.__name__, *map(str, victims)]
        self.processes = []
        for rank in range(ranks):
            own = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (folder / f"rank-{rank}.txt").open("wb") as output:
                self.processes.append(Popen(command, cwd=ROOT, env=own, stdout=output, stderr=output))

    def codes(self, expected_stopped=()) -> list[int | None]:
        """Exit codes; None for a rank that never ends because it was stopped (it is killed here)."""
        for rank, process in enumerate(self.processes):
            if rank not in expected_stopped:
                with suppress(TimeoutExpired):
                    process.wait(60)
        codes = [process.poll() for process in self.processes]
        for process in self.processes:
            process.kill()
            process.wait()
        return codes

    def output(self, rank: int) -> str:
        return (self.folder / f"rank-{rank}.txt").read_text()

    def verdict(self, rank: int) -> str:
        """What ``on_verdict`` was called with."""
        return (self.folder / f"verdict-{rank}.txt").read_text()


if __name__ == "__main__":
    run_rank([int(victim) for victim in sys.argv[2:]], globals()[sys.argv[1]])
