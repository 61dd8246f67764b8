"""Predictions held against the real engine, and against what is known of the released sizes."""

import json
from pathlib import Path

import numpy as np
import pytest

from dico_t2i.cli import main
from dico_t2i.config import ClusterConfig, Config, load_config
from dico_t2i.models import trained_sizes
from dico_t2i.plan.buffers import bucket_size
from dico_t2i.plan.communication import buckets, communication, left_over
from dico_t2i.plan.cost import traced_pass
from dico_t2i.plan.plan import make_plan
from dico_t2i.plan.text import refusal
from tests.training.conftest import launch

ROOT = Path(__file__).resolve().parents[1]
SMALL = """
extends: {base}
name: small
model: {{hidden_size: {width}, depths: [2, 2, 2, 2, 2], mlp_ratio: 2{text}}}
data: {{path: nowhere, streams: 8}}
optimizer: {{ema: [0.9, 0.99]}}
train: {{duration: {{steps: 10}}, global_batch: 8}}
cluster: {{gpus_per_node: 0}}
"""


def write(folder: Path, text: bool = False, width: int = 96) -> Path:
    path = folder / "small.yaml"
    base = ROOT / "configs" / ("base_t2i.yaml" if text else "base_imagenet.yaml")
    path.write_text(SMALL.format(base=base, width=width, text=", pooled_text: false" if text else ""))
    return path


def run(module: str, config: Config, folder: Path, *arguments: str) -> dict:
    """What a script prints of a config, on as many ranks as its cluster has."""
    path = folder / "resolved.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json", exclude_none=True)))
    process = launch(config.cluster.ranks, "-m", module, str(path), *arguments, cwd=ROOT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return json.loads(next(line for line in output.splitlines() if line.startswith("RESULT")).removeprefix("RESULT"))


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (False, {"precision": "bf16", "zero_stage": 1, "micro_batch": 8}),
        pytest.param(False, {"precision": "fp32", "zero_stage": 1, "micro_batch": 8}, marks=pytest.mark.long),
        (True, {"precision": "bf16", "zero_stage": 2, "micro_batch": 8}),
        (True, {"precision": "bf16", "zero_stage": 3, "micro_batch": 4}),
        pytest.param(False, {"precision": "bf16", "zero_stage": 1, "micro_batch": 2}, marks=pytest.mark.long),
        (False, {"precision": "fp32", "zero_stage": 0, "micro_batch": 8}),
        pytest.param(False, {"precision": "fp32", "zero_stage": 0, "micro_batch": 2}, marks=pytest.mark.long),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_memory_is_within_ten_percent_of_the_engines(tmp_path, text, overrides):
    path = write(tmp_path, text)
    config = load_config(path, [f"train.{key}={value}" for key, value in overrides.items()])
    plan = make_plan(config)
    measured = run("tests.plan_memory", config, tmp_path)["peak"]
    memory = plan.estimate.memory
    predicted = memory.tensors - memory.encoders
    print(f"predicted {predicted / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB")
    assert abs(predicted / measured - 1) < 0.1


STEPPING = ["train.micro_batch=1", "train.global_batch=2", "data.streams=2"]


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.long) for stage in (2, 3))])
def test_the_optimizers_step_can_take_the_most(tmp_path, stage):
    """Where activations are small: one rank, one sample a pass."""
    path = write(tmp_path, width=160)
    config = load_config(path, [*STEPPING, f"train.zero_stage={stage}"])
    memory = make_plan(config).estimate.memory
    measured = run("tests.plan_memory", config, tmp_path)["peak"]
    assert memory.activations == 0
    assert abs((memory.tensors - memory.encoders) / measured - 1) < 0.1


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long)])
def test_the_memory_of_two_ranks(tmp_path, stage):
    """With two buffers of gradients: one is filled while the other is sent."""
    changes = [f"train.zero_stage={stage}", "cluster.tasks_per_node=2", "train.micro_batch=4"]
    config = load_config(write(tmp_path), changes)
    memory = make_plan(config).estimate.memory
    measured = run("tests.plan_memory", config, tmp_path)["peak"]
    assert abs((memory.tensors - memory.encoders) / measured - 1) < 0.1


def test_what_is_sent_in_a_step(tmp_path):
    """On two ranks, in two passes: an all-reduce counts twice, half of everything stays where it is."""
    path = write(tmp_path)
    changes = ["data.image_size=64", "train.global_batch=4", "train.micro_batch=1", "data.streams=4"]
    config = load_config(path, [*changes, "cluster.tasks_per_node=2", "cluster.hardware={latency_us: 0.1}"])
    plan = make_plan(config)
    measured = run("tests.plan_traffic", config, tmp_path, *map(str, range(1, 4)))
    for stage, collectives in measured.items():
        sent = sum(size * (2 if name == "all_reduce" else 1) for name, size, _ in collectives) / 2
        assert abs(plan.communication[int(stage)].sent / sent - 1) < 0.15, stage
    sizes = trained_sizes(config.model, None)
    *early, late = buckets(traced_pass(config, 1), sum(sizes), bucket_size(sizes, 2, config.cluster))
    assert early
    for stage, passes in (("1", 1), ("2", 2)):
        reduced = [(size, within) for name, size, within in measured[stage] if name == "all_reduce" and size > 1000]
        assert reduced == passes * [*((2 * size, True) for _, size in early), (2 * late[1], False)], stage


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, 0),
        (1.0, 1),  # the last bucket, for which no computing is left
        (4.0, 7),  # the first is sent until 9, so the second from 9 to 13, and the last one from 13 to 17
        (5.0, 10),  # from 5, 10 and 15 on
    ],
)
def test_what_the_backward_pass_cannot_hide(seconds, expected):
    """Operations of one second each, buckets after seconds 5, 8 and 10."""
    ends = np.arange(1.0, 11.0)
    assert left_over(ends, [(4, 1), (7, 1), (9, 1)], lambda elements: seconds * elements) == pytest.approx(expected)


def test_buckets_hold_the_largest_parameter_and_else_cost_the_least():
    cluster = ClusterConfig()
    sizes = [1_000_000] * 500

    def cost(size: float) -> float:
        return sum(sizes) / size * 30e-6 + 2 * size * 2 / cluster.rate

    size = bucket_size(sizes, 2, cluster)
    assert cost(size) < min(cost(1.05 * size), cost(size / 1.05))
    assert bucket_size([*sizes, 2 * size], 2, cluster) == 2 * size
    assert bucket_size([10, 20], 2, cluster) == 30


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_communication_is_hidden_behind_computing(stage):
    """Where computing takes long, all but the ends, and the weights at stages 1 and 2; where it is quick, nothing."""
    path, tasks = ROOT / "configs" / "dico_xl_imagenet256.yaml", [f"train.zero_stage={stage}", "cluster.nodes=2"]
    slow, fast = (
        communication(load_config(path, [*tasks, f"cluster.hardware={{peak_tflops: {rate}, memory_gb_s: {rate}}}"]))
        for rate in (50, 5e7)
    )
    assert slow.seconds == fast.seconds
    assert slow.hidden / slow.seconds == pytest.approx((0, 2 / 3, 2 / 3, 1)[stage], abs=0.1)
    assert fast.exposed == pytest.approx(fast.seconds, rel=0.01)
    assert communication(load_config(path, [*tasks[:1], "cluster.gpus_per_node=1"])).seconds == 0


def test_the_paper_sizes():
    plan = make_plan(load_config(ROOT / "configs" / "dico_xl_imagenet256.yaml", ["cluster.nodes=4"]))
    assert plan.parameters == 701_151_368
    assert abs(plan.macs_per_image / 87.2e9 - 1) < 0.01
    assert 2.9 < plan.flops_per_image / (2 * plan.macs_per_image) < 3.1


@pytest.mark.parametrize(
    ("name", "gmacs"), [("dit_xl_imagenet256", 118.66), pytest.param("mmdit_coco", None, marks=pytest.mark.long)]
)
def test_peers_are_planned_alike(name, gmacs):
    plan = make_plan(load_config(ROOT / "configs" / "peers" / f"{name}.yaml"))
    assert gmacs is None or abs(plan.macs_per_image / 1e9 / gmacs - 1) < 0.01
    assert 2.9 < plan.flops_per_image / (2 * plan.macs_per_image) < 3.2
    none, everything = (plan.recomputing[word].memory.activations for word in ("no stage", "all stages"))
    assert everything < 0.3 * none


def test_what_does_not_fit_is_refused_with_what_does(capsys):
    path, large = ROOT / "configs" / "dico_s_imagenet256.yaml", ["train.global_batch=2048", "train.micro_batch=2048"]
    plan = make_plan(load_config(path, [*large, "cluster.gpus_per_node=1"]))
    assert not plan.estimate.fits
    assert plan.remedies
    assert all(estimate.fits for estimate in plan.remedies.values())
    assert "train.micro_batch=" in refusal(plan)
    for change in plan.remedies:
        changed = load_config(path, [large[0], *_split(change), "cluster.gpus_per_node=1"])
        assert make_plan(changed).estimate.fits, change
    with pytest.raises(SystemExit) as left:
        main(["plan", "--config", str(path), "--gpus-per-node", "1", *large])
    assert left.value.code == 2
    assert "needs" in capsys.readouterr().err


def _split(change: str) -> list[str]:
    return change.replace(" model.", "\nmodel.").replace(" train.", "\ntrain.").split("\n")


@pytest.mark.long
def test_more_ranks_and_stages_take_less_memory():
    path = ROOT / "configs" / "dico_h_t2i.yaml"
    sizes = [
        make_plan(load_config(path, [f"cluster.nodes={nodes}", f"train.zero_stage={stage}"])).estimate.memory.tensors
        for nodes, stage in ((1, 0), (1, 1), (16, 1), (16, 3))
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_numbers_are_written_as_json(tmp_path, capsys):
    arguments = ["plan", "--config", "configs/dico_s_t2i.yaml", "--nodes", "1", "--json", str(tmp_path / "plan.json")]
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--cluster", "configs/cluster/h200.yaml"])
    assert left.value.code == 0
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["hardware"]["name"] == "H200"
    assert written["estimate"]["memory"]["activations"] > 0
    assert "there are no data yet" in capsys.readouterr().out
