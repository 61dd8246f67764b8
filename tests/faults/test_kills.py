"""SIGKILL at random instants, on random ranks, inside saves too; then everything as if nothing had happened."""

import signal

import pytest

from .harness import OwnDeath, Report, compare, survive


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.long) for stage in (0, 1, 3)), 2])
def test_a_run_survives_kills(new_run, whole_run, stage, capsys, long):
    """Inside a save and between two steps; with more kills, at the start too."""
    kills, steps = (7, 60) if long else (2, 20)
    overrides = (f"train.duration.steps={steps}", f"train.zero_stage={stage}")
    run = new_run(*overrides)
    report = survive(run, kills, ranks=2, seed=stage)
    compare(report, run, whole_run(*overrides))
    with capsys.disabled():
        print(f"\nZeRO-{stage}: {report}")
    assert report.kills == kills
    assert report.in_save > 0
    assert (report.lost, report.repeated, report.differences) == (0, 0, [])


@pytest.mark.long
def test_a_run_on_cached_latents_survives_kills(new_run, whole_run, cached_latents):
    overrides = ("train.duration.steps=26", "train.micro_batch=2", *cached_latents)  # two passes a step
    run = new_run(*overrides)
    report = survive(run, 3, ranks=2, seed=5)
    compare(report, run, whole_run(*overrides))
    assert (report.lost, report.repeated, report.differences) == (0, 0, [])


def test_the_comparison_sees_lost_and_repeated_batches(new_run, whole_run):
    whole = whole_run("train.duration.steps=12")
    run = new_run("train.duration.steps=12")
    job = run.start()
    assert job.wait() == [0, 0]
    record = job.folder / "rank-1.jsonl"
    batches = record.read_text().splitlines(keepends=True)
    for changed, lost, repeated in ((batches[:-1], 1, 0), ([*batches, batches[2]], 0, 1)):
        record.write_text("".join(changed))
        report = Report(ranks=2)
        compare(report, run, whole)
        assert (report.lost, report.repeated, len(report.differences)) == (lost, repeated, 1)


def test_a_kill_with_data_workers_does_not_keep_the_run_locked(new_run, whole_run):
    overrides = ("train.duration.steps=12", "data.workers=1")
    run = new_run(*overrides)
    job = run.start()
    job.until(lambda: run.reached(5))
    job.kill()
    run.train()
    report = Report(ranks=2)
    compare(report, run, whole_run("train.duration.steps=12"))
    assert (report.lost, report.repeated, report.differences) == (0, 0, [])


@pytest.mark.parametrize("death", [OwnDeath(1, 3), OwnDeath(0, 5)], ids=["rank 1 in a save", "rank 0 in a save"])
def test_the_ranks_that_are_left_end_by_themselves(new_run, death):
    job = new_run("train.duration.steps=100000").start(death=death)
    codes = job.wait()
    assert codes[death.rank] == -signal.SIGKILL
    assert codes[1 - death.rank] > 0


def test_ranks_and_stages_change_at_each_restart(new_run, whole_run):
    steps = "train.duration.steps=16"
    whole = whole_run(steps, ranks=1)
    run = new_run(steps)
    for ranks, stage, killed_at in ((1, 1, 4), (2, 2, 8), (4, 3, 12)):
        job = run.start(f"train.zero_stage={stage}", ranks=ranks)
        job.until(lambda: run.reached(killed_at))  # noqa: B023
        job.kill()
    run.train("train.zero_stage=0", ranks=1)
    assert all(job.start_step for job in run.jobs[1:])
    assert run.history() == whole.history()
    losses, expected = run.losses(), whole.losses()
    assert losses.keys() == expected.keys() == set(range(1, 17))
    assert max(abs(losses[step] / expected[step] - 1) for step in expected) < 1e-5
