import os
import shutil
import signal

import pytest
import torch

from data_prep.shapes import make_sample
from dico_t2i.command import REQUEUE_EXIT_CODE
from dico_t2i.config import ConfigError, load_config
from dico_t2i.data.writer import ShardWriter
from dico_t2i.runs.checkpoint import candidates, newest_checkpoint, read_weights

from .conftest import launch


def final(runs, name, kind="weight"):
    checkpoint = newest_checkpoint(runs.folder / name / "checkpoints")
    return dict(read_weights(checkpoint, kind))


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), pytest.param(2, 2, marks=pytest.mark.long), (3, 2)])
def test_stopping_and_going_on_changes_no_bit(runs, stage, ranks):
    overrides = (f"train.zero_stage={stage}",)
    runs.train("whole", *overrides, ranks=ranks)
    assert all(m["flops_utilization"] > 0 and m["bytes_per_s"] > 0 for m in runs.metrics("whole") if "loss" in m)
    assert any(m.get("event") == "memory" and m["bytes"]["weights"] > 0 for m in runs.metrics("whole"))
    output = runs.stop_at(4, "parts", *overrides, ranks=ranks)
    assert "saved at step" in output, output
    assert max(runs.losses("parts")) < 8, "stopped too late to show anything"
    runs.train("parts", *overrides, ranks=ranks)
    assert runs.losses("parts") == runs.losses("whole")
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema_0.9", "ema_0.99"):
        whole, parts = final(runs, "whole", kind), final(runs, "parts", kind)
        for name, value in whole.items():
            assert torch.equal(value, parts[name]), (kind, name)


@pytest.mark.long
def test_ranks_and_stages_may_change_on_the_way(runs):
    runs.train("whole", "train.duration.steps=9")
    for steps, stage, ranks in ((3, 1, 1), (6, 3, 2), (9, 0, 1)):
        runs.train("parts", f"train.duration.steps={steps}", f"train.zero_stage={stage}", ranks=ranks)
    whole, parts = runs.losses("whole"), runs.losses("parts")
    assert whole.keys() == parts.keys() == set(range(1, 10))
    for step, loss in whole.items():
        assert abs(parts[step] - loss) <= 1e-5 * loss, step


def test_bf16_trains_on_two_ranks(runs):
    runs.train("bf16", "train.precision=bf16", "train.zero_stage=2", ranks=2)
    runs.train("fp32", "train.zero_stage=2", ranks=2)
    for step, loss in runs.losses("fp32").items():
        assert abs(runs.losses("bf16")[step] - loss) < 0.02 * loss


def test_metrics_previews_and_config_are_in_the_run_folder(runs):
    preview = ("preview.every.steps=4", "preview.prompts=[a red circle, a blue square, a green cross]")
    runs.train("full", *preview, ranks=2, fork=False)
    folder = runs.folder / "full"
    assert sorted(p.name for p in (folder / "samples").iterdir()) == ["step-00000004.png", "step-00000008.png"]
    assert load_config(folder / "config.yaml").name == "full"
    last = [m for m in runs.metrics("full") if "loss" in m][-1]
    assert last["images"] == 64
    assert {"loss", "mse", "vb", "grad_norm", "lr", "images_per_s", "data_wait", "peak_memory_gb"} <= last.keys()
    events = [m["event"] for m in runs.metrics("full") if "event" in m]
    assert events[0] == "start"
    assert events[-1] == "done"


def test_wandb_offline_needs_no_key(runs):
    runs.train("tracked", "log.wandb=auto", "train.duration.steps=2")
    assert list((runs.folder / "tracked" / "wandb").glob("offline-run-*"))


def test_a_signal_on_one_rank_stops_all_with_the_requeue_code(runs):
    script = "import sys; from dico_t2i.cli import main; main(sys.argv[1:])"
    process = launch(1, "-c", script, *runs.command("signalled", "train.duration.steps=100000")[2:])
    for line in process.stdout:
        if line.startswith("step 2 "):
            os.kill(process.pid, signal.SIGUSR1)
    assert process.wait(timeout=120) == REQUEUE_EXIT_CODE
    assert candidates(runs.folder / "signalled" / "checkpoints")


def test_another_config_does_not_continue_a_run(runs):
    runs.train("mine", "train.duration.steps=1")
    output = runs.train("mine", "model.mlp_ratio=4", code=2)
    assert "model.mlp_ratio: 2.0 -> 4.0" in output
    output = runs.train("mine", "optimizer.lr=5e-4", "train.duration.steps=2")
    assert "optimizer.lr: 0.001 -> 0.0005" in output
    assert (runs.folder / "mine" / "config.1.yaml").exists()


def test_other_data_are_told(runs, tmp_path):
    runs.train("grown", "train.duration.steps=1")
    with ShardWriter(tmp_path / "more", samples_per_shard=16) as writer:
        for number in range(32):
            writer.write(make_sample(number, size=16, seed=1, two_objects=0.0, held_out=False))
    output = runs.train("grown", f"data.path={tmp_path / 'more'}", "train.duration.steps=2")
    assert "WARNING: the data are {'samples': 32, 'shards': 2}, but were {'samples': " in output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=/nowhere", "/nowhere"),
        ("model={kind: dit, hidden_size: 16, depth: 1, num_heads: 2, in_channels: 3}", ".cls member"),
        ("model.text_dim=16", "model.text_dim=32"),
        ("data.streams=3", "does not divide train.global_batch"),
        ("text_encoder={kind: transformers, model: /no/such/clip}", "/no/such/clip"),
    ],
)
def test_bad_input_is_told_before_training(runs, override, message):
    output = runs.train("bad", override, code=2)
    assert message in output
    assert "Traceback" not in output
    assert not (runs.folder / "bad" / "checkpoints").exists()


def test_a_damaged_checkpoint_is_passed_over(runs):
    runs.train("hurt", "checkpoint.every.steps=4")
    newest = candidates(runs.folder / "hurt" / "checkpoints")[0]
    shard = next(newest.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    output = runs.train("hurt", "train.duration.steps=9")
    assert "step-00000008 is skipped" in output.replace("\n", "")
    assert "step-00000004" in output
    assert set(runs.losses("hurt")) == set(range(1, 10))


def test_too_many_bad_samples_stop_the_run_with_a_checkpoint(runs, shapes_data):
    data = runs.folder / "data"
    shutil.copytree(shapes_data, data)
    shard = data / "shard-000001.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    output = runs.train("spoilt", f"data.path={data}", "data.max_bad_samples=5", "data.retries=0", code=2)
    assert "data.max_bad_samples: 5 samples could not be used" in output
    assert 0 < newest_checkpoint(runs.folder / "spoilt" / "checkpoints").step < 8
    assert [m for m in runs.metrics("spoilt") if m.get("event") == "bad sample"]


def test_a_run_in_use_is_not_touched(runs):
    process = launch(1, *runs.command("busy", "train.duration.steps=100000"))
    for line in process.stdout:
        if line.startswith("step 1 "):
            output = runs.train("busy", "train.duration.steps=100000", code=2)
            assert "in use by another job" in output.replace("\n", " ")
            process.terminate()
    assert process.wait(timeout=120) == REQUEUE_EXIT_CODE


def test_ranks_that_do_not_divide_the_streams(runs):
    config = load_config(runs.config)
    with pytest.raises(ConfigError, match="not divisible by the 3 ranks"):
        config.batching(3)
