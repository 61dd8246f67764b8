"""Ranks that run a loop of collectives under a watchdog, and what goes wrong in it."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from dico_t2i.training.ranks.distributed import join_world
from dico_t2i.training.ranks.watchdog import Watchdog
from tests.ports import free_port

TIMEOUT_S, STEPS, AT = 2.0, 40, 20  # the step at which it goes wrong


def sleep_in_data(watchdog, step):
    time.sleep(60)


def wait_for_a_stopped_child(watchdog, step):
    """As a data worker that is stopped with its answer half sent."""
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    (Path(os.environ["FOLDER"]) / "child.txt").write_text(str(child))
    os.kill(child, signal.SIGSTOP)
    os.waitpid(child, 0)


def sleep_in_step(watchdog, step):
    watchdog.beat(step, "step")
    time.sleep(60)


def sleep_in_first_step(watchdog, step):
    if step == 0:
        time.sleep(1.5 * TIMEOUT_S)


def stop(watchdog, step):
    time.sleep(0.25 * TIMEOUT_S)  # until the others have heard of this step
    os.kill(os.getpid(), signal.SIGSTOP)


def kill(watchdog, step):
    time.sleep(0.25 * TIMEOUT_S)
    os.kill(os.getpid(), signal.SIGKILL)


def kill_leaving_a_child(watchdog, step):
    """As a data worker does, the child outlives the rank and holds what it inherited."""
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    kill(watchdog, step)


def fail(watchdog, step):
    raise ValueError("shard 7 is gone")


def allow_more(watchdog, step):
    watchdog.beat(step, "save", extra_s=2 * TIMEOUT_S)
    time.sleep(1.5 * TIMEOUT_S)


def go_on_slowly(watchdog, step):
    for _ in range(4):
        watchdog.beat(step, "data")
        time.sleep(0.5 * TIMEOUT_S)


def leave_late(watchdog, step):
    if step == STEPS - 1:
        time.sleep(0.5 * TIMEOUT_S)


SAME_BEATS = {allow_more: 1, go_on_slowly: 4, sleep_in_step: 1}
EVERY_STEP = (sleep_in_first_step, leave_late)


def run_rank(folder, rank, ranks, port, victims, fault):
    output = os.open(folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["FOLDER"] = str(folder)
    torch.set_num_threads(1)
    world = join_world()

    def note(step, message):
        (folder / f"verdict-{rank}.txt").write_text(f"{step} {message}")

    with Watchdog(world, TIMEOUT_S, 3 * TIMEOUT_S, note) as watchdog:
        for step in range(STEPS):
            watchdog.beat(step, "data")
            if step == AT or fault in EVERY_STEP:
                if rank in victims:
                    fault(watchdog, step)
                else:
                    for _ in range(SAME_BEATS.get(fault, 0)):
                        watchdog.beat(step, "step")
            watchdog.beat(step, "step")
            dist.all_reduce(torch.ones(1))
    print("done")
    sys.stdout.flush()
    os._exit(0)


class Ranks:
    """Ranks as processes, forked from a server that has imported torch already."""

    def __init__(self, folder: Path, ranks: int, victims: tuple[int, ...], fault) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.folder, port = folder, free_port()
        arguments = [(folder, rank, ranks, port, victims, fault) for rank in range(ranks)]
        self.processes = [context.Process(target=run_rank, args=each) for each in arguments]
        for process in self.processes:
            process.start()

    def codes(self, expected_stopped=()) -> list[int | None]:
        """Exit codes; None for a rank that never ends because it was stopped (it is killed here)."""
        for rank, process in enumerate(self.processes):
            if rank not in expected_stopped:
                process.join(60)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def output(self, rank: int) -> str:
        return (self.folder / f"rank-{rank}.txt").read_text()

    def verdict(self, rank: int) -> str:
        """What ``on_verdict`` was called with."""
        return (self.folder / f"verdict-{rank}.txt").read_text()
