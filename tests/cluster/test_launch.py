"""Launching training jobs on a real SLURM of two nodes, and what users read when something is wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.state import read_state
from dico_t2i.runs.log import json_lines
from tests.cluster.workplace import ROOT, job_id, state_of

BOOM = """
import sys
if "cluster.rank" in " ".join(sys.orig_argv):
    from dico_t2i.training import trainer
    original = trainer.Trainer._train_step
    def step(self, *arguments):
        if self.world.rank == 1 and self.step == 5:
            raise RuntimeError("boom")
        original(self, *arguments)
    trainer.Trainer._train_step = step
"""


def test_a_failing_program_is_shown_and_given_up_after_the_same_step_twice(slurm, workplace):
    (workplace.folder / "sitecustomize.py").write_text(BOOM)
    output = workplace.launch(f"cluster.env.PYTHONPATH={workplace.folder}:{ROOT}", "--follow", code=1)
    assert output.count('raise RuntimeError("boom")') >= 2
    assert re.search(r"FAILED at step \d+: rank 1 on .*:\nTraceback", output)
    assert "given up: failed twice at step" in output
    failures = list(json_lines(workplace.runs / "tiny" / "failures.jsonl"))
    assert [failure["rank"] for failure in failures] == [1, 1]
    assert state_of(job_id(output)) == "FAILED"
    assert "RuntimeError: boom" in workplace.call("status.py", "--folder", "runs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--partition", "nope"), "--partition nope: no such partition; there are "),
        (("--nodes", "3", "data.streams=6", "train.global_batch=6"), "--nodes 3: partition main has 2 nodes"),
        (("--nodes", "3"), "data.streams: 4 is not divisible by the 3 ranks"),
        (("data.path=/nowhere",), "/nowhere: no such data folder"),
        (("autoencoder={kind: kl, path: /nowhere}", "data.image_size=32", "model.in_channels=4"), "/nowhere"),
        (("--constraint", "nope"), "SLURM refuses the job: Invalid feature specification"),
        (("--time", "soon"), "cluster.time: 'soon'"),
        (("--cluster", "nope.yaml"), "nope.yaml: no such"),
        (("cluster.python=/nowhere/python",), "cluster.python: /nowhere/python: No such file or directory"),
        (("cluster.python=/usr/bin/false",), "cluster.python: /usr/bin/false cannot run this"),
        (("--local",), "--local: one run on one node"),
        (("--signal-lead", "99999"), "--signal-lead 99999: must be shorter than the time limit"),
    ],
)
def test_bad_input_is_told_before_anything_is_queued(slurm, workplace, arguments, message):
    output = workplace.launch(*arguments, code=2)
    assert message in output
    assert len([line for line in output.splitlines() if line.startswith("error")]) == 1
    assert subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout == ""


def test_without_slurm_the_remedy_is_named(workplace):
    output = subprocess.run(
        [sys.executable, str(ROOT / "cluster" / "launch.py"), "--config", str(workplace.config)],
        capture_output=True,
        text=True,
        env={"PATH": "/nowhere"},
        check=False,
    )
    assert output.returncode == 2
    assert "no SLURM here (sbatch is not on PATH): launch from a login node, or use --local" in output.stderr


def test_a_dry_run_for_sixteen_nodes_passes_sbatch(large_slurm, workplace):
    arguments = ["--config", str(ROOT / "configs" / "dico_h_t2i.yaml"), "--nodes", "16", "--dry-run"]
    output = workplace.call("launch.py", *arguments)
    script = Path(re.search(r"^sbatch script: (.*)$", output, re.MULTILINE)[1])
    subprocess.run(["sbatch", "--test-only", str(script)], check=True)
    assert "#SBATCH --gpus-per-node=8" in script.read_text()
    assert "SLURM would accept it" in output
    assert subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout == ""
    refused = workplace.call("launch.py", *arguments, "--sbatch", "gpus-per-node=9", code=2)
    assert "SLURM refuses the job" in refused


def test_local_runs_the_same_job_without_slurm(workplace):
    output = workplace.launch("--local", "--nodes", "1", "--tasks-per-node", "2", "--follow", "train.duration.steps=6")
    assert "2 ranks on" in output
    assert "[done] 6 steps" in output
    assert read_state(workplace.runs / "tiny").word == "done"
