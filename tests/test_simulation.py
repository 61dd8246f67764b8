"""The simulator of long runs against formulas, against single steps, and against what jobs decide."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from dico_t2i.config import ClusterConfig, ReliabilityConfig
from dico_t2i.plan.intervals import daly_interval, expected_goodput, young_interval
from dico_t2i.plan.simulate import (
    SPENT,
    Interruption,
    Job,
    Stretch,
    best_interval,
    mean_goodput,
    simulate,
    simulate_run,
    slowest_of,
    try_intervals,
)
from dico_t2i.runs.decisions import save_is_due, signal_lead_s, steps_until_save

QUIET = ReliabilityConfig(node_mtbf_hours=1e12, queue_minutes=0, requeue_s=0, start_s=0, relaunch_hours=0)
CALM = Job(
    steps=10_000,
    step_s=1.0,
    every_s=None,
    every_steps=100,
    report_steps=10,
    pause_s=5.0,
    save_s=5.0,
    load_s=0.0,
    hang_timeout_s=600.0,
    limit_s=1e12,
    lead_s=0.0,
    nodes=4,
    ranks=32,
    max_requeues=10**9,
    site=QUIET,
)


def with_site(job=CALM, **changes):
    return replace(job, site=job.site.model_copy(update=changes))


def run(job, *interruptions):
    """One run with these interruptions and no others."""
    return simulate_run(job, np.random.default_rng(0), iter([Interruption(*each) for each in interruptions]))


def hours(outcome):
    return {part: seconds / 3600 for part, seconds in outcome.spent.items() if seconds}


def test_a_run_without_interruptions_takes_its_steps_and_saves():
    outcome = run(CALM)
    assert outcome.finished
    assert outcome.seconds == pytest.approx(10_000 + 100 * 5)  # the last save is the one at the end
    assert outcome.spent["training"] == 10_000


@pytest.mark.parametrize(("wait", "start"), [(0, 0), (600, 300)])
def test_exponential_failures_cost_what_the_formula_says(wait, start):
    """A step of 10 s, saves every 500 s that take 20 s, a failure every hour, on 5 nodes together."""
    job = with_site(node_mtbf_hours=5, start_s=start, queue_minutes=wait / 60)
    job = replace(job, nodes=5, steps=20_000, step_s=10.0, every_steps=50, pause_s=20.0, save_s=20.0)
    assert job.mtbf_s == pytest.approx(3600)
    found = mean_goodput(simulate(job, 60))
    assert found == pytest.approx(expected_goodput(500, 20, 3600, start, wait), rel=0.01)


def test_the_best_interval_is_that_of_the_formulas():
    job = replace(with_site(node_mtbf_hours=20), nodes=4, steps=50_000, step_s=2.0, pause_s=20.0, save_s=20.0)
    tried = try_intervals(job, 40)
    best, daly = best_interval(tried).every_s, daly_interval(20, job.mtbf_s)
    assert young_interval(20, 18_000) == pytest.approx(848.5, abs=0.1)
    assert daly == pytest.approx(835.0, abs=1)  # 848.5 (1 + sqrt(1/1800)/3 + 1/16200) - 20
    assert 0.7 < best / daly < 1.4
    at = min(tried, key=lambda one: abs(one.every_s - daly))
    assert best_interval(tried).goodput - at.goodput < 0.003
    for one in tried:
        assert one.goodput == pytest.approx(expected_goodput(one.every_s - 20, 20, job.mtbf_s, 0, 0), rel=0.02)


def test_the_formula_of_daly_has_youngs_as_its_limit():
    assert daly_interval(1, 1e9) == pytest.approx(young_interval(1, 1e9), rel=1e-3)
    assert daly_interval(100, 10) == 10


@pytest.mark.parametrize("every", [(None, 7), (23.0, None), (1.0, None)])
@pytest.mark.parametrize("save_s", [2.0, 11.0])
def test_steps_and_saves_come_when_training_does_them(every, save_s):
    """Step by step, as ``Trainer`` does: a save waits for the one before it."""
    step_s, pause_s = 2.0, 1.5
    first = steps_until_save(*every, 3, 0.0, step_s)
    stretch = Stretch(step_s, pause_s, save_s, first, steps_until_save(*every, 3 + first, pause_s, step_s))
    now, saved_at, complete = 0.0, 0.0, [(0.0, 0)]
    for done in range(1, 200):
        assert stretch.steps(now + 0.5 * step_s) == done - 1
        now += step_s
        assert stretch.seconds(done) == pytest.approx(now)
        if save_is_due(*every, 3 + done, now - saved_at):
            saved_at = max(now, complete[-1][0])
            complete.append((saved_at + save_s, done))
            now = saved_at + pause_s
    for (when, step), (then, _) in pairwise(complete):
        assert stretch.saved((when + then) / 2) == step


def test_what_was_not_saved_is_repeated():
    outcome = run(CALM, (350.0, "rank crashed"))  # saves from 100 to 105, 205 to 210, 310 to 315
    assert outcome.spent["repeated steps"] == pytest.approx(350 - 3 * 5 - 300)
    assert outcome.spent["training"] == 10_000
    late = run(replace(CALM, save_s=50.0), (350.0, "rank crashed"))  # the third checkpoint is not complete at 350
    assert late.spent["repeated steps"] == pytest.approx(350 - 3 * 5 - 200)


def test_a_job_gives_up_when_it_fails_twice_at_a_step():
    """Also if it never came to a step; then somebody has to launch it again."""
    job = with_site(start_s=60.0, relaunch_hours=5)
    assert "given up" not in run(job, (400.0, "rank crashed"), (900.0, "rank crashed")).events
    outcome = run(job, (400.0, "rank crashed"), (30.0, "rank crashed"))
    assert outcome.events["given up"] == 1
    assert outcome.spent["waiting"] > 0
    assert outcome.finished


def test_lost_nodes_do_not_count_as_failures_of_the_job():
    outcome = run(with_site(start_s=60.0), (30.0, "node lost"), (30.0, "rack lost"), (30.0, "rank crashed"))
    assert "given up" not in outcome.events


def test_a_job_gives_up_after_so_many_requeues():
    crashes = [(1000.0 + 200 * number, "rank crashed") for number in range(4)]
    assert run(replace(CALM, max_requeues=4), *crashes).events["given up"] == 0
    assert run(replace(CALM, max_requeues=3), *crashes).events["given up"] == 1


def test_a_time_limit_costs_a_save_and_a_start():
    job = replace(with_site(start_s=100.0, requeue_s=20.0), limit_s=2100.0, lead_s=50.0)
    outcome = run(job)
    starts = outcome.events["time limit"] + 1
    assert outcome.spent["repeated steps"] == pytest.approx(0)
    assert outcome.spent["starting"] == 100 * starts
    assert outcome.spent["waiting"] == 20 * (starts - 1)
    assert starts == 6  # 1950 s of training and saves in each


@pytest.mark.parametrize(("grace", "repeated"), [(10.0, 0.0), (3.0, 45.0)])
def test_a_preemption_is_harmless_if_there_is_time_to_save(grace, repeated):
    outcome = run(with_site(preemption_grace_s=grace), (150.0, "preempted"))
    assert outcome.events["preempted"] == 1
    assert outcome.spent["repeated steps"] == pytest.approx(repeated, abs=1.0)


@pytest.mark.parametrize(("spare", "waited"), [(None, 0), (8, 0), (3, 10), (0, 10)])
def test_a_lost_rack_is_replaced_by_spare_nodes(spare, waited):
    job = with_site(spare_nodes=spare, repair_hours=10)
    outcome = run(job, (500.0, "rack lost"))
    assert hours(outcome).get("waiting", 0) == pytest.approx(waited)


def test_a_hang_is_noticed_late():
    outcome = run(with_site(hang_share=1.0), (500.0, "rank crashed"))
    assert outcome.spent["hanging"] == 600


def test_rates_add_up():
    job = with_site(node_mtbf_hours=100, rank_mtbf_hours=400, rack_mtbf_hours=50, rack_nodes=3, preemption_hours=1)
    assert {kind: 3600 * rate for kind, rate in job.rates.items()} == pytest.approx(
        {"node lost": 4 / 100, "rank crashed": 32 / 400, "rack lost": 2 / 50, "preempted": 1}
    )
    assert job.mtbf_s == pytest.approx(3600 / (0.04 + 0.08 + 0.04))
    outcomes = simulate(replace(job, steps=200_000, every_steps=50), 20)
    events = sum(one.events["node lost"] for one in outcomes), sum(one.events["preempted"] for one in outcomes)
    assert events[1] / events[0] == pytest.approx(1 / 0.04, rel=0.35)


def test_the_slowest_of_many():
    """Of 9 uniform draws the largest is 0.9 on average, with variance 9 / (100 * 11)."""
    mean, deviation = slowest_of(np.linspace(0, 1, 10_001), 9)
    assert mean == pytest.approx(0.9, abs=1e-3)
    assert deviation == pytest.approx((9 / 1100) ** 0.5, abs=1e-3)
    outcome = run(replace(CALM, slowest=(1.5, 0.1)))
    assert outcome.spent["slow ranks"] == pytest.approx(5000, rel=0.01)
    assert outcome.goodput == pytest.approx(10_000 / (15_000 + 500), rel=0.01)


def test_time_is_accounted_for_once_and_a_seed_repeats_it():
    job = replace(
        with_site(node_mtbf_hours=2, preemption_hours=3, start_s=30, queue_minutes=5), limit_s=7200, lead_s=60
    )
    first, again, other = (simulate(job, 5, seed) for seed in (1, 1, 2))
    assert [one.spent for one in first] == [one.spent for one in again] != [one.spent for one in other]
    for one in first:
        assert set(one.spent) <= set(SPENT)
        assert one.spent["training"] == pytest.approx(job.steps * job.step_s)
        assert min(one.spent.values()) >= -1e-6
        assert one.seconds == pytest.approx(one.allocated_s + one.spent["waiting"])


def test_a_run_that_gets_nowhere_ends():
    outcome = simulate(replace(with_site(node_mtbf_hours=0.002), steps=50), 1)[0]
    assert not outcome.finished


def test_the_lead_before_a_time_limit():
    assert signal_lead_s(86_400, None, None) == 300
    assert signal_lead_s(86_400, None, 40.0) == 140
    assert signal_lead_s(400, None, 400.0) == 200
    assert signal_lead_s(86_400, 77, 400.0) == 77
    with pytest.raises(ValueError, match="shorter than the time limit of 60 s"):
        signal_lead_s(60, 77, None)


def test_the_keys_stand_in_a_profile():
    assert ClusterConfig(reliability={"node_mtbf_hours": 1000, "rack_nodes": 8}).reliability.rack_nodes == 8


def test_times_of_a_run_are_read_from_its_log(tmp_path):
    from dico_t2i.plan.job import measured_times

    events = [
        {"step": 1, "event": "memory", "start_s": 9.0},
        {"step": 10, "step_s": 7.0},  # with the first step
        {"step": 20, "step_s": 0.4},
        {"step": 20, "event": "saved", "pause_s": 0.2, "seconds": 1.0},
        {"step": 20, "event": "resume"},
        {"step": 21, "event": "memory", "start_s": 12.5},
        {"step": 30, "step_s": 3.0},
        {"step": 40, "step_s": 0.6},
    ]
    with pytest.raises(ValueError, match="no reports in its metrics"):
        measured_times(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in events))
    assert measured_times(tmp_path) == pytest.approx(
        {"step_s": 0.5, "pause_s": 0.2, "save_s": 1.0, "start_s": 12.0, "load_s": 0.0}
    )
