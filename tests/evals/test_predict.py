"""The predicted time of a step: every operator is in it, and what is measured finds its row."""

import pytest
import torch

pytest.importorskip("triton")
from dico_t2i.models import DiCoConfig
from evals import gpu_code
from evals.speed import aims, predict
from evals.speed.machine_code import MACHINES
from evals.speed.networks import Setting, trace_step

META = torch.device("meta")
CONFIG = DiCoConfig(hidden_size=8, depths=(1, 1, 1, 1, 1), mlp_ratio=2.0, condition="text", text_dim=16)
GPUS = ("A100", "H200")


@pytest.fixture
def rows(monkeypatch):
    """Without compiling: a call takes 2 ms, 1 ms of issue."""
    monkeypatch.setattr(predict, "_compiled", lambda call, machine: (2e-3, 1e-3))
    trace_step("ours", Setting(CONFIG, 2, 8, META))  # the first one also copies the tables of the schedule
    return predict.predict(CONFIG, 2, 8, GPUS).rows


def test_all_work_is_in_the_rows(rows):
    traced, parameters = trace_step("ours", Setting(CONFIG, 2, 8, META))
    assert sum(row.flops for row in rows) == traced.products.sum() + traced.others.sum()
    assert sum(row.traffic for row in rows) == traced.traffic.sum() + 40 * parameters
    compiled = [row for row in rows if row.operator in predict.COMPILED]
    assert {row.operator for row in rows if row.operator.startswith("dico_t2i")} == {r.operator for r in compiled}
    assert all(row.predicted_s["A100"] == pytest.approx(2e-3 * row.calls) for row in compiled)
    product = next(row for row in rows if row.operator == "aten::mm")
    least = max(product.flops / MACHINES["H200"].products, product.traffic / MACHINES["H200"].bandwidth)
    assert product.predicted_s["H200"] >= least * (1 - 1e-9)


def test_a_call_becomes_its_kernels():
    from dico_t2i.plan.trace import Call

    x, tokens = (2, 8, 8, 16), (2, 77, 16)
    for name, shapes, kernel in (
        ("dico_t2i::text_dwconv_backward", (tokens, x), "text_forward"),
        ("dico_t2i::text_dwconv_backward", (x, tokens, x), "text_backward"),
        ("dico_t2i::depthwise", (x, (16, 1, 3, 3)), "depthwise_forward"),
        ("dico_t2i::linear_gelu", (x, (32, 16), (32,)), "linear_gelu_forward"),
    ):
        assert predict._kernels(Call(name, shapes)).func.__name__ == kernel


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_a_norm_is_counted_with_the_parts_that_it_has(gated, modulated, added):
    from dico_t2i.plan.trace import Call

    x, vector, statistic = (2, 8, 8, 16), (2, 16), (2, 8, 8)
    shapes = (x, statistic, statistic, *(vector,) * (2 * modulated), *((x, vector) if gated else ()), *(x,) * added, x)
    call = predict._kernels(Call("dico_t2i::norm_modulate_backward", shapes))
    *_, shift, _, branch, gate, residual, grad, again = call.args
    there = [part is not None for part in (shift, branch, gate, residual, grad)]
    assert there == [modulated, gated, gated, added, True]
    assert again


def test_measured_times_find_their_rows(rows):
    total = predict.measure_step(CONFIG, 2, 8, torch.device("cpu"), rows)
    by_name = {row.operator: row for row in rows}
    assert by_name["aten::mm"].measured_s > 0
    assert by_name["dico_t2i::norm_modulate_backward"].measured_s > 0
    assert sum(row.measured_s or 0 for row in rows) == pytest.approx(total)
    text = predict.markdown("title", rows, GPUS)
    large = [row for row in rows if row.predicted_s["H200"] > predict.SMALL * predict.total(rows).predicted_s["H200"]]
    assert 5 < len(large) < len(rows)
    assert text.count("\n") == 2 + 2 + len(large) + 2
    assert f"| {len(rows) - len(large)} other operators |" in text
    assert "A100, ms" in text


def test_goals_are_those_of_the_worst_shape(monkeypatch, rows):
    kernels = ("depthwise_forward", "depthwise_slope", "depthwise_backward", "text_forward")
    made = [
        gpu_code.Row("", kernel, "", 128, 0, 16, {}, 100, useful, issue_s, 1.0)
        for kernel in kernels
        for useful, issue_s in ((70, 1.1), (60, 1.3))
    ]
    monkeypatch.setattr(gpu_code, "rows", lambda *_: made)
    found = list(aims.aims(predict.Step(rows, 293e6), predict.Step(rows[1:], 351e6)))
    assert [aim.reached for aim in found] == [False] * 3 + [True, False, True, True, True, False]
    text = aims.markdown(found)
    assert "| text_forward: multiply-adds, % of its loop | 60 | at least 65 | no |" in text
    assert "| class: kept for the backward pass, MB an image | 293 | at most 293 | yes |" in text
