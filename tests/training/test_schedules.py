"""Optimizers besides AdamW, and the schedule that lets a run be prolonged: each goes on as if it had not stopped."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from dico_t2i.config import ConfigError, OptimizerConfig, Span, parse_config
from dico_t2i.runs.kinds import MOMENTS
from dico_t2i.training.eight_bit import Adam8bitEMA
from dico_t2i.training.optimizer import AdamWEMA, Matrix, MuonEMA, learning_rate
from tests.faults.harness import CONFIG, Run, write_data

WSD = "optimizer={schedule: wsd, decay: {steps: 4}, warmup: {steps: 2}, lr: 0.01, ema: [0.9]}"
MUON = "optimizer={kind: muon, schedule: constant, lr: 0.01, ema: [0.9], weight_decay: 0.1}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("schedules") / "data")


def whole_and_stopped(folder, data, *overrides):
    """The same run of four steps, once at a stretch and once in two parts."""
    whole, stopped = (Run(folder, data, name, *overrides) for name in ("whole", "stopped"))
    whole.train("train.duration.steps=4")
    stopped.train("train.duration.steps=2")
    stopped.train("train.duration.steps=4")
    return whole, stopped


def test_the_rate_rises_stays_and_falls():
    config = OptimizerConfig(lr=1.0, schedule="wsd", decay=Span(steps=4), warmup=Span(steps=2))
    rates = [learning_rate(config, step, 10, 2, 4) for step in range(10)]
    assert rates == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_muon_with_equal_gradients_is_torchs_own():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 8)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer = MuonEMA(ours, OptimizerConfig(kind="muon", lr=0.01, weight_decay=0.1, ema=(0.9,)))
    optimizer.matrices = {layer.weight: [Matrix(layer.weight.shape, 0, 0, layer.weight.numel())] for layer in ours}
    options = {"lr": 0.01, "weight_decay": 0.1}
    muon = torch.optim.Muon([layer.weight for layer in theirs], adjust_lr_fn="match_rms_adamw", **options)
    adam = torch.optim.AdamW([layer.bias for layer in theirs], **options)
    for _ in range(3):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for stepping in (optimizer, muon, adam):
            stepping.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_moments_of_8_bits_change_little_and_survive_a_checkpoint_unchanged():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    start = torch.randn(5000)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    config = OptimizerConfig(lr=1e-3, ema=(0.9,), weight_decay=0.1)
    packed, plain = Adam8bitEMA([ours], config), AdamWEMA([theirs], config)
    for _ in range(30):
        ours.grad = (torch.randn(5000) + 0.5) * torch.logspace(-3, 0, 5000)
        theirs.grad = ours.grad.clone()
        packed.step()
        plain.step()
    assert 0 < (ours - theirs).norm() < 0.03 * (theirs - start).norm()
    state = packed.state[ours]
    assert state["exp_avg"].nbytes == 5120 + 4 * 20
    before = {name: state[name] for name in MOMENTS}
    whole = {name: packed.part(ours, name, 0, 5000) for name in MOMENTS}
    assert all(torch.equal(packed.part(ours, name, 300, 777), whole[name][300:777]) for name in MOMENTS)
    state |= whole
    packed.settle()
    for name in MOMENTS:
        assert all(torch.equal(a, b) for a, b in zip(state[name], before[name], strict=True))


def test_8_bit_moments_go_on_where_they_stopped(tmp_path, data):
    pytest.importorskip("torchao")
    whole, stopped = whole_and_stopped(tmp_path, data, MUON.replace("muon", "adamw_8bit"))
    whole.assert_same(stopped)


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.long), 1, pytest.param(2, marks=pytest.mark.long)])
def test_muon_goes_on_where_it_stopped(tmp_path, data, stage):
    whole, stopped = whole_and_stopped(tmp_path, data, MUON, f"train.zero_stage={stage}")
    whole.assert_same(stopped)
    kinds = {key.split(":")[0] for key in load_file(next(whole.checkpoints.glob("step-00000004/*0.safetensors")))}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq", "ema_0.9"}
    with pytest.raises(AssertionError, match="different config"):
        stopped.train("train.duration.steps=6", "optimizer.kind=adamw")


def test_a_run_that_stops_while_its_rate_falls_goes_on_exactly(tmp_path, data):
    whole, stopped = (Run(tmp_path, data, name, WSD, "train.duration.steps=9") for name in ("whole", "stopped"))
    whole.train()
    job = stopped.start()
    job.until(lambda: stopped.reached(6))
    job.signal(0, signal.SIGTERM)
    job.wait()
    stopped.train()
    whole.assert_same(stopped)


def test_a_prolonged_run_is_the_longer_one(tmp_path, data):
    """Although only the last checkpoint is kept, and it was trained with a falling rate."""
    kept = ("checkpoint={every: {steps: 3}, keep_last: 1}",)
    whole, prolonged = (Run(tmp_path, data, name, WSD, *kept) for name in ("whole", "prolonged"))
    whole.train("train.duration.steps=14")
    prolonged.train("train.duration.steps=9")
    assert prolonged.valid_steps() == [5, 9]
    told = prolonged.train("train.duration.steps=14")
    assert "prolonged from step-00000005" in told
    assert prolonged.valid_steps() == [10, 14]
    assert (prolonged.checkpoints / "decayed-00000009" / "manifest.json").exists()
    assert {s: loss for s, loss in prolonged.losses().items() if s > 5} == {
        s: loss for s, loss in whole.losses().items() if s > 5
    }
    whole.assert_same_shards(prolonged)


def test_a_run_without_its_stable_checkpoint_is_prolonged_with_a_warning(tmp_path, data):
    run = Run(tmp_path, data, "run", WSD)
    run.train("train.duration.steps=5", ranks=1)
    for step in run.valid_steps()[:-1]:
        next(run.checkpoints.glob(f"step-{step:08d}/manifest.json")).unlink()
    assert "there is no checkpoint from before; the run continues from" in run.train("train.duration.steps=7", ranks=1)
    assert max(run.losses()) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"schedule": "wsd"}}, "decay: schedule: wsd needs it"),
        ({"optimizer": {"decay": {"steps": 3}}}, "no other schedule has it"),
        ({"optimizer": {"schedule": "wsd", "decay": {"minutes": 3}}}, "optimizer.decay: give steps, images or epochs"),
        ({"optimizer": {"kind": "muon"}, "train": {**CONFIG["train"], "zero_stage": 3}}, "muon needs whole matrices"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({**CONFIG, "data": {**CONFIG["data"], "path": "nowhere"}, **changes}, "test")
