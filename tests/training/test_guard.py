import json
import math

from dico_t2i.config import GuardConfig
from dico_t2i.runs.checkpoint import newest_checkpoint
from dico_t2i.training.guard import Guard


def steady(guard, steps, norm=1.0):
    for step in range(steps):
        guard.judge(step, step * 8, 8, norm, skipped=False)


def test_a_spike_is_known_once_the_mean_has_settled():
    guard = Guard(GuardConfig(spike=3.0), None)
    steady(guard, 49)
    assert guard.limit == math.inf
    steady(guard, 1)
    assert abs(guard.limit - 3.0) < 1e-12
    guard.judge(50, 400, 8, 2.0, skipped=False)
    assert abs(guard.limit - 3 * (0.98 + 0.02 * 2)) < 1e-12


def test_no_spike_limit_unless_wished():
    guard = Guard(GuardConfig(), None)
    steady(guard, 100)
    assert guard.limit == math.inf


def test_skipped_steps_in_a_row_are_listed_and_end_in_a_verdict(tmp_path):
    guard = Guard(GuardConfig(max_skipped=3), tmp_path / "quarantine.jsonl")
    for step, skipped in enumerate((True, True, False, True, True)):
        guard.judge(step, 8 * step, 8, math.nan if skipped else 1.0, skipped)
        assert not guard.lost
    guard.judge(5, 40, 8, math.inf, skipped=True)
    assert guard.lost
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [line["positions"] for line in lines] == [[0, 8], [8, 16], [24, 32], [32, 40], [40, 48]]
    assert guard.state.norm_mean == 1.0


def test_what_a_checkpoint_lacks_stays_at_its_start():
    guard = Guard(GuardConfig(), None)
    guard.restore({"rollbacks": 2})
    assert (guard.state.rollbacks, guard.state.good_steps) == (2, 0)


def test_a_run_that_diverges_goes_back_once_skips_the_stretch_and_then_stops(runs):
    runs.train("wild", "train.duration.steps=4")
    ruin = ("optimizer.lr=1e30", "optimizer.warmup=null", "optimizer.clip=0.0", "guard.max_skipped=3")
    ruin += ("checkpoint.every={steps: 6}",)  # when the weights are lost already: nothing is saved then
    output = runs.train("wild", *ruin, "train.duration.steps=100", code=2)
    events = [m for m in runs.metrics("wild") if m.get("event") == "rollback"]
    assert [(e["step"], "continues from sample 64" in e["message"]) for e in events] == [(4, True)]
    assert "quarantine.jsonl" in output
    lines = [json.loads(line) for line in (runs.folder / "wild" / "quarantine.jsonl").read_text().splitlines()]
    # One step ruins the weights, the next three are skipped; then the same from the checkpoint on other data.
    assert [line["positions"][0] // 8 for line in lines] == [5, 6, 7, 9, 10, 11]
    assert newest_checkpoint(runs.folder / "wild" / "checkpoints").step == 4
