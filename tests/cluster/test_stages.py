"""A run in stages on a real SLURM, preempted in each stage."""

import subprocess

import pytest
import yaml

from cluster.state import read_state
from tests.cluster.workplace import job_id, state_of, until

STAGES = [
    {"name": "16 px", "train": {"duration": {"steps": 120}}},
    {"name": "32 px", "data": {"image_size": 32}, "train": {"duration": {"steps": 120}, "global_batch": 4}},
]


@pytest.mark.long
def test_a_run_preempted_in_each_stage_ends_bit_equal(slurm, workplace):
    """tests/training/test_stages.py has the short form, without SLURM."""
    tree = yaml.safe_load(workplace.config.read_text())
    workplace.config.write_text(yaml.safe_dump({**tree, "stages": STAGES}))
    output = workplace.launch()
    assert "stage 32 px: batch 4 = 2 ranks x 2 x 1 pass(es)" in output
    job, run = job_id(output), workplace.runs / "tiny"
    for restarts, (step, stage) in enumerate(((30, "16 px"), (140, "32 px")), start=1):
        until(lambda: read_state(run).step >= step, f"step {step}")  # noqa: B023
        assert read_state(run).stage == stage
        subprocess.run(["scontrol", "requeue", job], check=True)
        until(lambda: read_state(run).restarts == restarts, f"restart {restarts}")  # noqa: B023
    until(lambda: state_of(job) == "COMPLETED", "the end")
    assert read_state(run).step == read_state(run).steps == 240
    workplace.assert_undisturbed("tiny")
