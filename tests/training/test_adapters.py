"""Runs that train an adapter of the weights of another run, and what is made of it."""

import json

import pytest
import torch

from dico_t2i import cli
from dico_t2i.config import SamplerConfig, load_config
from dico_t2i.models import read_adapter
from dico_t2i.pipeline import DiCoPipeline
from dico_t2i.plan.plan import make_plan
from dico_t2i.runs.checkpoint import newest_checkpoint
from dico_t2i.sampling.pipeline import load_pipeline
from tests.faults.harness import Run, write_data

ADAPTER = "adapter={rank: 2, alpha: 4}"
SAMPLER = SamplerConfig(kind="dpm++", steps=3, guidance=1.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("adapters") / "data")


@pytest.fixture(scope="module")
def base(tmp_path_factory, data):
    """A run of two steps whose weights are all in use."""
    run = Run(tmp_path_factory.mktemp("base"), data, "base", "train.duration.steps=2", "optimizer.lr=0.05")
    run.train(ranks=1)
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data, base):
    """A run of an adapter of six steps on two ranks."""
    run = adapter_run(tmp_path_factory.mktemp("trained"), data, base, "six")
    run.train("train.duration.steps=6")
    return run


def adapter_run(root, data, base, name, *overrides):
    changes = ("optimizer={schedule: constant, lr: 0.01, ema: [0.5]}", *overrides)
    return Run(root, data, name, f"init={{from: {base.path}, weights: raw}}", ADAPTER, *changes)


def images(path, *adapter, weights=None):
    pipeline = load_pipeline(path, weights, torch.device("cpu"), torch.float32, *adapter)
    return pipeline.generate([0, 1, 2], [5, 6, 7], SAMPLER)


def dico(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code


def test_a_checkpoint_holds_the_adapter_alone_and_a_resume_is_bit_equal(tmp_path, data, base, trained):
    names = {key.split(":")[1] for shard in trained.shards() for key in shard}
    assert all(".lora_" in name for name in names)
    assert newest_checkpoint(trained.checkpoints).state["lineage"][0]["from"] == f"{base.path} (weight)"
    run = adapter_run(tmp_path, data, base, "six")
    run.train("train.duration.steps=3")
    run.train("train.duration.steps=6")
    run.assert_same(trained)


def test_all_stages_train_alike_and_preview_and_validate(tmp_path, data, base, trained):
    held_out = write_data(tmp_path / "held_out", samples=8)
    run = adapter_run(tmp_path, data, base, "three", "train.zero_stage=3", "train.duration.steps=6")
    more = (f"validation={{path: {held_out}, samples: 8, bands: 2, every: {{steps: 3}}}}",)
    run.train(*more, "preview={every: {steps: 3}, labels: [0, 1], sampler: {steps: 2, guidance: 1}}")
    for step, loss in trained.losses().items():
        assert abs(run.losses()[step] - loss) < 1e-4
    assert list((run.path / "samples").glob("*"))
    assert [line["val_loss"] for line in run.metrics() if "val_loss" in line]


def test_a_base_that_has_trained_on_is_another_one(tmp_path, data):
    base = Run(tmp_path, data, "base", "train.duration.steps=2")
    base.train(ranks=1)
    run = adapter_run(tmp_path, data, base, "run")
    run.train("train.duration.steps=1", ranks=1)
    base.train("train.duration.steps=3", ranks=1)
    told = run.train("train.duration.steps=2", ranks=1, code=2)
    assert f"is an adapter of {base.path} (weight), step 2, SHA-256" in told
    run.train("train.duration.steps=2", f"init.from={base.checkpoints / 'step-00000002'}", ranks=1)
    assert 2 in run.losses()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["init=null"], "adapter: it is added to all weights of a network; name it in init.from"),
        (["init.from=nowhere"], "nowhere: no such run or exported folder"),
        (["init.from=tests/conftest.py"], "is a file, but an adapter needs a run, a checkpoint or an exported folder"),
        (["model.hidden_size=16"], "the weights do not fit the model of the config"),
        (["adapter.targets=[blocks.*]"], "adapter.targets: blocks.* matches no linear layer"),
    ],
)
def test_what_cannot_be_is_told_before_training(tmp_path, data, base, changes, message):
    run = adapter_run(tmp_path, data, base, "run", *changes)
    assert message in run.train(ranks=1, code=2)


def test_the_file_of_an_adapter_gives_the_images_of_its_run_and_of_what_it_is_merged_into(tmp_path, base, trained):
    file, merged, scaled = tmp_path / "a.safetensors", tmp_path / "merged", tmp_path / "scaled"
    assert dico("export", "--checkpoint", trained.path, "--out", file) == 0
    assert dico("export", "--checkpoint", trained.path, "--out", merged) == 0
    half = ("--adapter", file, "--adapter-scale", "0.5")
    assert dico("export", "--checkpoint", base.path, "--weights", "weight", *half, "--out", scaled) == 0
    plain, ours = images(base.path, weights="weight"), images(trained.path)
    assert (ours != plain).any()
    assert torch.equal(images(base.path, file, 1.0, weights="weight"), ours)
    assert torch.equal(images(base.path, file, 0.0, weights="weight"), plain)
    assert torch.equal(images(merged), ours)
    assert torch.equal(images(scaled), images(base.path, file, 0.5, weights="weight"))
    lineage = json.loads((merged / "export.json").read_text())["lineage"]
    assert [entry["what"] for entry in lineage] == ["init", "adapter"]
    (entry,) = json.loads((scaled / "export.json").read_text())["lineage"]
    assert (entry["what"], entry["from"], entry["step"]) == ("adapter", file.name, 6)
    assert load_config(merged / "config.yaml").adapter is None
    assert dico("export", "--checkpoint", base.path, "--out", tmp_path / "b.safetensors") == 2


def test_the_exported_pipeline_takes_it(tmp_path, base, trained):
    file, plain, merged = tmp_path / "a.safetensors", tmp_path / "plain", tmp_path / "merged"
    assert dico("export", "--checkpoint", trained.path, "--out", file) == 0
    assert dico("export", "--checkpoint", trained.path, "--out", merged) == 0
    assert dico("export", "--checkpoint", base.path, "--weights", "weight", "--out", plain) == 0
    call = {"class_labels": [0, 1], "seed": 5, "num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "np"}
    pipeline, expected = (DiCoPipeline.from_pretrained(folder) for folder in (plain, merged))
    before = pipeline(**call).images
    pipeline.load_adapter(file)
    assert (pipeline(**call).images != before).any()
    assert (pipeline(**call).images == expected(**call).images).all()
    assert "def load_adapter" in (plain / "pipeline.py").read_text()


def test_dico_sample_takes_it_and_keeps_other_images(tmp_path, base, trained):
    file, out = tmp_path / "a.safetensors", tmp_path / "out"
    assert dico("export", "--checkpoint", trained.path, "--out", file) == 0
    command = ["sample", "--checkpoint", base.path, "--labels", "0", "--steps", "2", "--out", out]
    assert dico(*command, "--adapter", file, "--adapter-scale", "0.5") == 0
    assert "scale 0.5" in json.loads((out / "sample.json").read_text())["adapter"]
    assert dico(*command) == 2
    assert dico(*command, "--adapter", tmp_path / "none") == 2


def test_a_plan_counts_the_adapter(trained):
    config = load_config(trained.path / "config.yaml", ["cluster.gpus_per_node=0"])
    plan, whole = make_plan(config), make_plan(config.model_copy(update={"adapter": None, "init": None}))
    size = sum(t.numel() for t in read_adapter_of(trained).values())
    assert plan.parameters == whole.parameters
    assert plan.estimate.memory.moments == 8 * size
    assert plan.checkpoint_bytes == 4 * size * 4
    assert plan.estimate.memory.weights > whole.estimate.memory.weights
    assert plan.estimate.memory.total < whole.estimate.memory.total


def read_adapter_of(run):
    file = run.path / "adapter.safetensors"
    if not file.exists():
        assert dico("export", "--checkpoint", run.path, "--out", file) == 0
    return read_adapter(file)
