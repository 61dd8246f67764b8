"""Predictions held against the real engine, and against what is known of the released sizes."""

import json
from pathlib import Path

import numpy as np
import pytest

from dico_t2i.cli import main
from dico_t2i.config import ClusterConfig, Config, ConfigError, load_config
from dico_t2i.models import trained_sizes
from dico_t2i.plan.buffers import bucket_size
from dico_t2i.plan.communication import buckets, communication, left_over
from dico_t2i.plan.cost import traced_pass
from dico_t2i.plan.job import job_of
from dico_t2i.plan.plan import make_plan, make_plans
from dico_t2i.plan.text import refusal
from dico_t2i.plan.topology import Group
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
def test_memory_is_within_ten_percent_of_the_engines(tmp_path, monkeypatch, text, overrides):
    """On a CPU; there, GELU and the gate are not inside products, as the plan of a GPU takes them to be."""
    monkeypatch.setattr("dico_t2i.ops.linear.WIDEST", 0)
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
    """With two buffers of gradients: one is filled while the other is sent.

    On CPUs up to two more wait where one rank is slower than the other, as on a busy machine.
    """
    changes = [f"train.zero_stage={stage}", "cluster.tasks_per_node=2", "train.micro_batch=4"]
    config = load_config(write(tmp_path), changes)
    memory = make_plan(config).estimate.memory
    measured = run("tests.plan_memory", config, tmp_path)["peak"]
    expected = (memory.tensors - memory.encoders + waiting * memory.communication / 2 for waiting in range(3))
    assert min(abs(each / measured - 1) for each in expected) < 0.1


def test_what_is_sent_in_a_step(tmp_path):
    """On two ranks, in two passes: an all-reduce counts twice, half of everything stays where it is.

    The only bytes that the plan leaves out are those of the gradients' norm.
    """
    path = write(tmp_path)
    changes = ["data.image_size=64", "train.global_batch=4", "train.micro_batch=1", "data.streams=4"]
    config = load_config(path, [*changes, "cluster.tasks_per_node=2", "cluster.hardware={latency_us: 0.1}"])
    plan = make_plan(config)
    measured = run("tests.plan_traffic", config, tmp_path, *map(str, range(1, 4)))
    for stage, collectives in measured.items():
        sent = sum(_sent(*each) for each in collectives if each[1] > 8)
        assert abs(plan.communication[int(stage)].sent / sent - 1) < 0.15, stage
        assert plan.communication[int(stage)].sent == sent, stage
        assert [each[0] for each in collectives if each[1] <= 8] == ["all_reduce"]
    sizes = trained_sizes(config.model, None)
    *early, late = buckets(traced_pass(config, 1), sum(sizes), bucket_size(sizes, 2, config.cluster))
    assert early
    for stage, passes in (("1", 1), ("2", 2)):
        reduced = [(size, within) for name, size, within, _ in measured[stage] if name == "all_reduce" and size > 1000]
        assert reduced == passes * [*((2 * size, True) for _, size in early), (2 * late[1], False)], stage


def _sent(name, size, within, ranks):
    """The bytes that a rank sends in a ring."""
    return size * (2 if name == "all_reduce" else 1) * (ranks - 1) / ranks


@pytest.mark.long
def test_what_is_sent_in_groups_of_ranks(tmp_path):
    """On four ranks: after the first gather of a step, weights are gathered in groups of two."""
    changes = ["data.image_size=64", "train.global_batch=8", "train.micro_batch=1", "train.zero_stage=3"]
    config = load_config(write(tmp_path), [*changes, "cluster.tasks_per_node=4", "train.zero_group=2"])
    (collectives,) = run("tests.plan_traffic", config, tmp_path, "3:2").values()
    assert communication(config).sent == sum(_sent(*each) for each in collectives if each[1] > 8)
    assert {each[3] for each in collectives} == {2, 4}


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


HARDWARE = "cluster.hardware={link_gb_s: 400, network_gb_s: 25, latency_us: 1, link_hop_us: 2, network_hop_us: 10}"


def test_collectives_by_topology():
    """Four nodes of eight: a ring leaves each node over eight rails, and goes 28 times over a link, 3 times between."""
    cluster = load_config(ROOT / "configs" / "dico_s_t2i.yaml", ["cluster.nodes=4", HARDWARE]).cluster
    everyone, node, pair = (Group(cluster, ranks) for ranks in (32, 8, 2))
    assert (everyone.nodes, node.nodes) == (4, 1)
    assert (everyone.rate, node.rate) == (200e9, 400e9)
    assert Group(cluster.model_copy(update={"gpus_per_node": 1}), 4).rate == 25e9
    assert everyone.sent("all_reduce", 320) == 620
    assert pair.sent("all_gather", 320) == 160
    assert everyone.delay("all_gather") == pytest.approx(1e-6 * (3 * 10 + 28 * 2))
    assert everyone.delay("all_reduce") == pytest.approx(2e-6 * (2 * 10 + 7 * 2))
    assert node.delay("reduce_scatter") == pytest.approx(7 * 2e-6)
    assert everyone.seconds("all_gather", 32e9, 2) == pytest.approx(31e9 / 200e9 + 2 * 86e-6)


def test_groups_of_ranks_keep_gathers_in_the_node():
    path = ROOT / "configs" / "dico_xl_imagenet256.yaml"
    base = ["train.zero_stage=3", "cluster.nodes=8", "train.global_batch=1024", "train.micro_batch=8"]
    far, near = (communication(load_config(path, [*base, f"train.zero_group={n}"])) for n in ("null", 8))
    assert near.sent < far.sent
    assert near.seconds < far.seconds
    assert near.exposed <= far.exposed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.zero_group=8"], "zero_group: 8 with zero_stage: 1; only stage 3"),
        (["train.zero_group=3", "train.zero_stage=3"], "train.zero_group: 3 does not divide the 8 ranks"),
    ],
)
def test_groups_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(load_config(ROOT / "configs" / "dico_s_t2i.yaml", changes))


def plan_command(tmp_path, *arguments):
    file = tmp_path / "numbers.json"
    small = ["--config", str(write(tmp_path)), "--json", str(file), "--plot", str(tmp_path / "plot.png")]
    with pytest.raises(SystemExit) as left:
        main(["plan", *small, *arguments, "cluster.gpus_per_node=2"])
    assert left.value.code == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    return json.loads(file.read_text())


def test_a_sweep_of_the_number_of_nodes(tmp_path, capsys):
    found = plan_command(tmp_path, "--sweep-nodes", "1,4,8", "--per-gpu", "1")
    growing, fixed = found["growing batch"], found["fixed batch"]
    assert [(one["ranks"], one["batch"]) for one in growing] == [(2, 2), (8, 8), (16, 16)]
    assert [(one["ranks"], one["batch"]) for one in fixed] == [(2, 8), (8, 8)]
    efficiencies = [one["efficiency"] for one in growing]
    assert efficiencies[0] == 1
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert growing[0]["bottleneck"] in ("links", "delays")
    assert growing[2]["costs_s"]["network"] > 0
    assert growing[0]["batch_for_0.9"] == 2
    assert "the batch is always 8" in capsys.readouterr().out


def test_a_simulation_of_the_run(tmp_path, capsys):
    failing = "cluster.reliability={node_mtbf_hours: 0.001, step_s: 5, save_s: 1, pause_s: 1, start_s: 0, requeue_s: 0}"
    found = plan_command(tmp_path, "--simulate", "--times", "20", failing, "checkpoint.every={steps: 1}")
    assert found["runs"] == 20
    assert found["goodput"] < 0.5
    assert found["days"]["10 %"] <= found["days"]["50 %"] <= found["days"]["90 %"]
    assert found["events"]["node lost"] > 0
    assert "goodput" in capsys.readouterr().out


def test_slow_steps_are_read_from_a_file(tmp_path):
    file = tmp_path / "slow.txt"
    file.write_text("1\n1\n1\n2\n")
    config = load_config(write(tmp_path), [f"cluster.reliability={{slow_steps: {file}}}", "cluster.tasks_per_node=2"])
    job, notes = job_of(config, make_plans(config))
    assert job.slowest[0] == pytest.approx(1 + 7 / 16)
    assert "assumed, not measured: step_s, save_s, pause_s, load_s" in notes[0]
    file.write_text("1\nfast\n")
    with pytest.raises(ValueError, match=r"slow_steps: .*expected a positive number on each line"):
        job_of(config, make_plans(config))
