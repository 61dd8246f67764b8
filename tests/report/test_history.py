import json

import numpy as np
import pytest

from dico_t2i.report.history import EVENTS, Curve, read_history


def write(folder, *lines, torn=""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return folder


def report(step, time=0.0, **values):
    return {"step": step, "time": time, **values}


def event(step, kind, message="", time=0.0, **details):
    return {"step": step, "time": time, "event": kind, "message": message, **details}


def test_a_short_curve_is_what_was_reported():
    curve = Curve()
    for step, value in ((10, 0.5), (20, 1 / 3), (30, float("nan")), (40, float("inf")), (50, 2.0)):
        curve.add(step, value)
    assert curve.rows() == [[10, 0.5], [20, 0.333333], [50, 2.0]]


def test_a_long_curve_is_means_and_extremes_of_equal_numbers_of_reports():
    values = np.random.default_rng(0).normal(size=10_000)
    curve = Curve(points=100)
    for step, value in enumerate(values):
        curve.add(step, float(value))
    rows = np.array(curve.rows())
    assert 50 <= len(rows) <= 100
    width = 128  # 100 points of 128 reports would hold 12,800
    groups = [values[i : i + width] for i in range(0, len(values), width)]
    np.testing.assert_allclose(rows[:, 1], [group.mean() for group in groups], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows[:, 2], [group.min() for group in groups], rtol=1e-5)
    np.testing.assert_allclose(rows[:, 3], [group.max() for group in groups], rtol=1e-5)
    assert rows[0, 0] == (width - 1) / 2


def test_what_a_run_does_after_going_back_counts():
    curve = Curve()
    for step, value in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (3, 30.0), (4, 40.0), (5, 50.0)):
        curve.add(step, value)
    assert curve.rows() == [[1, 1.0], [2, 2.0], [3, 30.0], [4, 40.0], [5, 50.0]]


def test_events_are_told_or_counted(tmp_path):
    bad = [event(s, "bad sample", f"a.tar {s:04d}: not a JPEG; another took its place", time=s) for s in (3, 5, 9)]
    write(
        tmp_path,
        event(0, "start", "tiny", total_steps=10, parameters=1200),
        *bad,
        event(5, "saved", "checkpoint of step 5", time=6),
        report(6, time=7.0, loss=1.0, skipped_steps=2),
        event(9, "bad sample", "b.tar 7: cut off; another took its place", time=10),
        event(5, "rollback", "back from step 9", time=11),
        event(10, "done", "10 steps", time=12),
    )
    failure = {"time": 8.0, "job": "1", "start": 0, "step": 6, "code": 1, "rank": 3, "host": "n1", "error": "a\nlast"}
    (tmp_path / "failures.jsonl").write_text(json.dumps(failure) + "\n")
    history = read_history(tmp_path)
    told = [(e.kind, e.step, e.last, e.count, e.text) for e in history.events()]
    assert ("bad sample", 3, 9, 3, "a.tar: not a JPEG") in told
    assert ("bad sample", 9, 9, 1, "b.tar: cut off") in told
    assert ("rollback", 5, 5, 1, "back from step 9") in told
    assert ("failure", 6, 6, 1, "rank 3 on n1: last") in told
    assert [e[3] for e in told if e[0] == "skip"] == [2]
    assert history.marked()["bad sample"] == [3, 5, 9, 9]
    assert history.state == "done"
    assert history.start["parameters"] == 1200
    assert history.curves["loss"].rows() == [[6, 1.0]]


def test_pauses_between_starts_are_not_work(tmp_path):
    write(
        tmp_path,
        event(0, "start", time=100),
        report(1, time=130),
        event(1, "stop", time=140),
        event(1, "resume", time=5000),
        event(1, "start", time=5010),
        report(2, time=5030),
    )
    history = read_history(tmp_path)
    assert history.seconds == 30 + 10 + 20
    assert history.state == "running, or cut off"


def test_lines_that_are_none_are_counted_and_passed_over(tmp_path):
    write(
        tmp_path, report(1, loss=1.0), [1], {"loss": 2}, report("x", loss=3), report(2, loss=2.0), torn='{"step": 3, "l'
    )
    history = read_history(tmp_path)
    assert history.unreadable == 4
    assert history.curves["loss"].rows() == [[1, 1.0], [2, 2.0]]


def test_memory_does_not_grow_with_the_run(tmp_path):
    skips = (report(step, loss=1.0, skipped_steps=1) for step in range(3000))
    configs = (event(0, "config", f"changed {i}", time=1) for i in range(2 * EVENTS))
    history = read_history(write(tmp_path, *skips, *configs))
    assert len(history.events()) == EVENTS + 1
    assert len(history.marked()["skip"]) == pytest.approx(300, abs=1)
    assert history.events()[-1].text == f"changed {2 * EVENTS - 1}"
