"""Micro-batches made ready ahead, and decisions that stay on the device: the same results."""

import copy
import math
from functools import partial

import pytest
import torch

from dico_t2i.config import ConfigError, DiCoConfig, GuardConfig, OptimizerConfig, load_config
from dico_t2i.models import DiCo
from dico_t2i.training.ahead import Ahead
from dico_t2i.training.guard import Guard
from dico_t2i.training.inputs import Inputs
from dico_t2i.training.optimizer import AdamWEMA

CPU = torch.device("cpu")


def test_batches_come_in_order_and_are_made_once_whether_started_or_not():
    made = []

    def make(batch: int) -> Inputs:
        made.append(batch)
        return Inputs(*(torch.full((2,), batch) for _ in range(4)))

    ahead = Ahead(iter(range(6)).__next__, make, CPU)
    for number, starts in enumerate((0, 1, 2, 0, 1)):
        batch, inputs = ahead.take()
        assert (batch, inputs.t.tolist()) == (number, [number, number])
        for _ in range(starts):
            ahead.start()
        assert made == list(range(number + 1 + (starts > 0)))


def test_what_goes_wrong_with_a_batch_is_raised_where_it_is_fetched():
    ahead = Ahead(iter([1]).__next__, lambda batch: batch, CPU)
    assert ahead.take() == (1, 1)
    with pytest.raises(StopIteration):
        ahead.start()


def test_a_step_heard_of_is_judged_at_once_without_a_gpu(tmp_path):
    told, heard = Guard(GuardConfig(), None), Guard(GuardConfig(), tmp_path / "quarantine.jsonl")
    for step, norm in enumerate((1.0, math.inf, 0.5)):
        skipped = not math.isfinite(norm)
        told.judge(step, 8 * step, 8, norm, skipped)
        heard.hear(step, 8 * step, 8, torch.tensor(norm), torch.tensor(skipped))
        assert (heard.state, heard.skipped_in_row) == (told.state, told.skipped_in_row)
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 1


def test_late_steps_are_judged_in_their_order():
    guard = Guard(GuardConfig(max_skipped=2), None)
    for step in range(4):
        guard._heard.append(((step, 8 * step, 8), lambda step=step: [1.0 + step, float(step >= 2)]))
        guard.settle(keep=1)
        assert guard.skipped_in_row == max(0, step - 2)
    guard.settle()
    assert guard.lost
    assert guard.state.good_steps == 2


@pytest.mark.parametrize("skipped", [False, True])
def test_a_veto_that_stays_on_the_device_is_obeyed_as_one_that_is_read(skipped):
    """On a GPU the optimizer does not read it; the same kernels run here."""
    torch.manual_seed(0)
    start = [torch.randn(7, 3), torch.randn(5)]
    gradients = [torch.randn_like(w) for w in start]
    results = []
    for deferred in (False, True):
        weights = copy.deepcopy(start)
        optimizer = AdamWEMA(weights, OptimizerConfig(ema=(0.9, 0.99), weight_decay=0.1))
        optimizer.deferred = deferred
        for answer in (False, skipped, False):
            optimizer.veto = lambda answer=answer: torch.tensor(answer)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient * (math.nan if answer else 1.0)
            optimizer.step()
        states = [tensor for w in weights for _, tensor in sorted(optimizer.state[w].items())]
        results.append([*weights, *states])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][2 + 4].item() in (2.0, 3.0)  # the steps that counted


@pytest.mark.slow
def test_compiled_blocks_compute_what_the_others_do(long, monkeypatch):
    """The short form traces and lowers the blocks, and has torch run the result in place of compiled C++."""
    if not long:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    model = DiCo(DiCoConfig(hidden_size=8, depths=(1, 0, 0, 0, 0), mlp_ratio=2.0, condition="text", text_dim=12))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    compiled = copy.deepcopy(model)
    compiled.compile_blocks()
    assert compiled.state_dict().keys() == model.state_dict().keys()
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([1, 900]), torch.randn(2, 77, 12)
    results = []
    for network in (model, compiled):
        out = network(x, t, text)
        out.square().mean().backward()
        results.append([out, *(p.grad for p in network.parameters())])
    for plain, fast in zip(*results, strict=True):
        assert (plain is None) == (fast is None)
        if plain is not None:
            torch.testing.assert_close(fast, plain, rtol=1e-4, atol=2e-6 * float(plain.abs().max()))


def test_compiling_is_off_unless_asked_for_and_never_at_stage_3(runs):
    assert load_config(runs.config).train.compile == "off"
    assert load_config(runs.config, ["train.compile=blocks"]).train.compile == "blocks"
    with pytest.raises(ConfigError, match="zero_stage: 3"):
        load_config(runs.config, ["train.compile=blocks", "train.zero_stage=3"])
