"""A stop signal to any one rank: all save at the same step, leave with the requeue code, and go on exactly."""

import os
import signal
from pathlib import Path

import pytest

from dico_t2i.command import REQUEUE_EXIT_CODE

from .harness import Report, compare

STEPS = "train.duration.steps=20"


@pytest.mark.parametrize(
    ("number", "rank"),
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGUSR1, 1, marks=pytest.mark.long),
        pytest.param(signal.SIGUSR2, 1, marks=pytest.mark.long),
        pytest.param(signal.SIGUSR2, 0, marks=pytest.mark.long),
    ],
    ids=lambda value: getattr(value, "name", f"rank {value}"),
)
def test_a_signal_to_one_rank(new_run, whole_run, number, rank):
    run = new_run(STEPS, "checkpoint.every.steps=100")
    job = run.start()
    job.until(lambda: run.reached(4))
    job.signal(rank, number)
    assert job.wait() == [REQUEUE_EXIT_CODE] * 2, job.output
    stop = run.events("stop")[0]["step"]
    assert 4 <= stop < 20, "stopped too late to show anything"
    assert run.valid_steps() == [stop]
    assert job.last_step == stop
    run.train()
    assert run.jobs[-1].start_step == stop
    report = Report(ranks=2)
    compare(report, run, whole_run(STEPS))
    assert (report.lost, report.repeated, report.redone, report.differences) == (0, 0, 0, [])


def test_a_signal_to_the_data_workers_stops_nothing(new_run):
    run = new_run(STEPS, "data.workers=1")
    job = run.start()
    job.until(lambda: run.reached(2))
    for rank in range(2):
        workers = Path(f"/proc/{job.pid(rank)}/task/{job.pid(rank)}/children").read_text().split()
        assert workers
        for worker in workers:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(int(worker), number)
    assert job.wait() == [0, 0], job.output
    assert not run.events("stop")
