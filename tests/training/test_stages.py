"""Runs in stages: one run folder, one step count, exact over the border."""

import signal

import pytest
import torch
import yaml

from dico_t2i import cli
from dico_t2i.command import REQUEUE_EXIT_CODE
from dico_t2i.config import ConfigError, parse_config
from dico_t2i.config.stages import next_stage, plan_stages
from dico_t2i.export.folder import export
from dico_t2i.report import write_report
from dico_t2i.runs.checkpoint import open_checkpoint
from dico_t2i.runs.lineage import read_lineage
from dico_t2i.sampling.pipeline import load_pipeline
from tests.faults.harness import CONFIG, Run, write_data

SMALL = {"name": "small", "train": {"duration": {"steps": 30}}}
LARGE = {
    "name": "large",
    "data": {"image_size": 16, "streams": 2},
    "model": {"dropout_prob": 0.3},
    "optimizer": {"lr": 5e-4, "warmup": {"steps": 6}, "betas": [0.8, 0.9]},
    "train": {"duration": {"steps": 20}, "global_batch": 4, "micro_batch": 1},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("stages") / "data")


def staged(folder, data, *overrides, stages=(SMALL, LARGE)):
    """A run of the harness with stages."""
    run = Run(folder, data, "run", *overrides)
    tree = yaml.safe_load(run.config.read_text())
    run.config.write_text(yaml.safe_dump({**tree, "stages": list(stages)}))
    return run


def stop_at(run, step, ranks=2):
    job = run.start(ranks=ranks)
    job.until(lambda: run.reached(step))
    job.signal(ranks - 1, signal.SIGTERM)
    assert job.wait() == [REQUEUE_EXIT_CODE] * ranks, job.output


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    run = staged(tmp_path_factory.mktemp("whole"), data)
    run.train()
    return run


def test_stopped_in_each_stage_no_bit_differs(tmp_path, data, whole):
    run = staged(tmp_path, data)
    for step in (8, 36):
        stop_at(run, step)
    run.train()
    assert 8 <= run.events("stop")[0]["step"] < 30 < run.events("stop")[1]["step"] < 50
    assert run.losses() == whole.losses()
    assert [line["images"] for line in run.metrics() if "loss" in line][-1] == 30 * 8 + 20 * 4
    ours, theirs = run.state(), whole.state()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    lineage = [(entry["what"], entry["from"], entry["step"]) for entry in read_lineage(run.path)]
    assert lineage == [("stage", "small", 0), ("stage", "large", 30)]
    assert read_lineage(run.path) == read_lineage(whole.path)


def test_the_ranks_may_change_in_each_stage(tmp_path, data, whole):
    run = staged(tmp_path, data)
    stop_at(run, 8, ranks=1)
    stop_at(run, 36, ranks=2)
    run.train("train.zero_stage=3", ranks=1)
    for step, loss in whole.losses().items():
        assert abs(run.losses()[step] - loss) < 1e-4 * loss, step


def test_each_stage_has_its_own_settings_and_the_first_ends_with_a_checkpoint(whole, tmp_path):
    lines = {line["step"]: line for line in whole.metrics() if "loss" in line}
    assert [lines[step]["lr"] for step in (1, 3)] == pytest.approx([1e-3 / 3, 1e-3])
    assert lines[30]["lr"] < 1e-5  # the end of the cosine
    assert [lines[step]["lr"] for step in (31, 36)] == pytest.approx([5e-4 / 6, 5e-4])
    assert [event["stage"] for kind in ("start", "stage") for event in whole.events(kind)] == ["small", "large"]
    assert [event["total_steps"] for event in whole.events("start")] == [50]
    assert len(whole.events("done")) == 1
    assert 30 in whole.valid_steps()  # kept, although keep_last is 3
    cpu = torch.device("cpu")
    border = whole.checkpoints / "step-00000030"
    assert load_pipeline(border, None, cpu, torch.float32).config.data.image_size == 8
    assert load_pipeline(whole.path, None, cpu, torch.float32).config.data.image_size == 16
    assert open_checkpoint(border).state["stage"] == {"name": "small", "first_step": 0, "first_position": 0}
    export(whole.path, None, tmp_path / "export")
    assert "| stage | large | 30 | " in (tmp_path / "export" / "README.md").read_text()
    write_report([whole.path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<td>large</td>" in page
    assert "<dt>images seen</dt><dd>320</dd>" in page


def test_a_run_begins_at_a_named_stage_and_stages_are_added(tmp_path, data):
    short = {**LARGE, "train": {**LARGE["train"], "duration": {"steps": 3}}}
    run = staged(tmp_path, data, stages=(SMALL, short))
    run.train("--stage", "large", ranks=1)
    assert sorted(run.losses()) == [1, 2, 3]
    assert [line["images"] for line in run.metrics() if "loss" in line] == [4, 8, 12]
    assert "which the config does not have; its stages are: small, large" in run.train("--stage", "x", ranks=1, code=2)
    tree = yaml.safe_load(run.config.read_text())
    tree["stages"][1]["data"]["streams"] = 4
    run.config.write_text(yaml.safe_dump(tree))
    assert "data.streams: 2 -> 4" in run.train(ranks=1, code=2)
    tree["stages"] = [SMALL, short, {**short, "name": "more", "data": {"image_size": 8}}]
    run.config.write_text(yaml.safe_dump(tree))
    run.train("--stage", "large", ranks=1)  # the same command again
    assert sorted(run.losses()) == [1, 2, 3, 4, 5, 6]
    assert "nothing to do" in run.train(ranks=1)
    tree.pop("stages")
    run.config.write_text(yaml.safe_dump(tree))
    assert "stages: 3 have begun" in run.train(ranks=1, code=2)


def test_an_error_in_a_later_stage_is_told_at_the_start(tmp_path, data):
    nowhere = {**LARGE, "data": {**LARGE["data"], "path": "/nowhere"}}
    assert "/nowhere" in staged(tmp_path / "a", data, stages=(SMALL, nowhere)).train(ranks=1, code=2)
    held_out = {**LARGE, "validation": {"path": "/nowhere", "every": {"steps": 1}, "samples": 8}}
    run = staged(tmp_path / "b", data, stages=(SMALL, held_out))
    assert "/nowhere" in run.train(ranks=1, code=2)
    assert not run.path.exists()


def config(*stages):
    return parse_config({**CONFIG, "data": {**CONFIG["data"], "path": "x"}, "stages": list(stages)}, "test")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"name": "small"}, "two stages have the name small"),
        ({"name": "b", "model": {"hidden_size": 16}}, "stages.1.model: hidden_size: all stages train one network"),
        ({"name": "b", "model": {"dropout_prob": 0}, "sampler": {"guidance": 1}}, "a null class cannot come or go"),
        ({"name": "b", "data": {"image_size": 10}}, "stages.b:\n  data.image_size: 10 must be divisible by 4"),
        ({"name": "b", "train": {"rate": 1}}, "stages.b:\n  train.rate: unknown key"),
        ({"name": "b", "seed": 1}, "stages.1.seed: unknown key"),
    ],
)
def test_a_stage_that_does_not_fit_is_named(stage, message):
    with pytest.raises(ConfigError) as error:
        config(SMALL, stage)
    assert message in str(error.value)


def test_where_stages_begin_and_end():
    epochs = {"name": "epochs", "train": {"duration": {"epochs": 2}}, "validation": None}
    stages = plan_stages(config(SMALL, LARGE, epochs), [64, 64, 40])
    assert [(s.first_step, s.last_step, s.first_position, s.run_steps) for s in stages] == [
        (0, 30, 0, 60),
        (30, 50, 240, 60),
        (50, 60, 320, 60),
    ]
    assert next_stage(stages, 0, 0, {}).name == "small"
    assert next_stage(stages, 30, 240, stages[0].record) == stages[1]
    assert next_stage(stages, 60, 400, stages[2].record) == stages[2]
    longer = plan_stages(config({**SMALL, "train": {"duration": {"steps": 45}}}, LARGE), [64, 64])
    late = next_stage(longer, 35, 260, stages[1].record)  # the first stage's new length comes too late
    assert (late.name, late.first_step, late.last_step, late.first_position) == ("large", 30, 50, 240)
    skipped = next_stage(stages, 10, 80, stages[0].record, begin="large")
    assert (skipped.first_step, skipped.last_step, skipped.first_position) == (10, 30, 80)
    assert next_stage(stages, 35, 260, stages[1].record, begin="small").name == "large"


def test_a_plan_has_every_stage_their_sum_and_a_refusal(tmp_path, capsys):
    file = tmp_path / "stages.yaml"
    hardware = {"name": "G", "memory_gb": 3.5}
    tree = {**CONFIG, "data": {**CONFIG["data"], "path": "x"}, "stages": [SMALL, LARGE]}
    tree["cluster"] = {"nodes": 1, "gpus_per_node": 2, "hardware": hardware}
    file.write_text(yaml.safe_dump(tree))

    def plan(*overrides):
        with pytest.raises(SystemExit) as end:
            cli.main(["plan", "--config", str(file), "--json", str(tmp_path / "plan.json"), *overrides])
        printed = capsys.readouterr()
        return end.value.code, printed.out + printed.err

    code, shown = plan()
    assert code == 0
    assert "tiny, stage large: " in shown
    assert "GPU-hours" in shown
    rows = {
        line.split("│")[1].strip(): line.split("│")[2].strip() for line in shown.splitlines() if line.count("│") == 8
    }
    assert (rows["small"], rows["large"], rows["all"]) == ("30", "20", "50")
    plans = yaml.safe_load((tmp_path / "plan.json").read_text())["stages"]
    assert [entry["steps"] for entry in plans] == [30, 20]
    code, shown = plan("stages.large.data.image_size=2048", "stages.large.train.micro_batch=2")
    assert code == 2
    assert "tiny, stage large needs" in shown
    assert "stage small needs" not in shown
