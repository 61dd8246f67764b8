"""A run in stages on a real SLURM, preempted in each stage."""

import subprocess

import pytest
import torch
import yaml

from cluster.state import read_state
from dico_t2i.runs.log import json_lines
from tests.cluster.workplace import job_id, state_of, until

STAGES = [
    {"name": "16 px", "train": {"duration": {"steps": 300}}},
    {"name": "32 px", "data": {"image_size": 32}, "train": {"duration": {"steps": 200}, "global_batch": 4}},
]


def test_a_run_preempted_in_each_stage_ends_bit_equal(slurm, workplace, long):
    if not long:
        pytest.skip("takes a minute; tests/training/test_stages.py has the short form, without SLURM")
    tree = yaml.safe_load(workplace.config.read_text())
    workplace.config.write_text(yaml.safe_dump({**tree, "stages": STAGES}))
    output = workplace.launch()
    assert "stage 32 px: batch 4 = 2 ranks x 2 x 1 pass(es)" in output
    job, run = job_id(output), workplace.runs / "tiny"
    for restarts, (step, stage) in enumerate(((50, "16 px"), (330, "32 px")), start=1):
        until(lambda: read_state(run).step >= step, f"step {step}")  # noqa: B023
        assert read_state(run).stage == stage
        subprocess.run(["scontrol", "requeue", job], check=True)
        until(lambda: read_state(run).restarts == restarts, f"restart {restarts}")  # noqa: B023
    until(lambda: state_of(job) == "COMPLETED", "the end")
    assert read_state(run).step == read_state(run).steps == 500
    workplace.train_undisturbed("whole")
    whole, parts = workplace.weights("whole"), workplace.weights("tiny")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    losses = {
        line["step"]: line["loss"] for line in json_lines(workplace.runs / "whole/metrics.jsonl") if "loss" in line
    }
    assert all(losses[line["step"]] == line["loss"] for line in json_lines(run / "metrics.jsonl") if "loss" in line)
