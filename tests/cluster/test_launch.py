"""Training jobs on a real SLURM of two nodes: stopped in every way, bit-equal in the end; and what users are told."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from cluster import slurm as commands
from cluster.state import read_state
from dico_t2i.runs.checkpoint import newest_checkpoint, read_weights
from dico_t2i.runs.log import json_lines
from tests import forkserver
from tests.training.conftest import TINY, launch

ROOT = Path(__file__).resolve().parents[2]
STEPS = 600
PATIENCE_S = 240


class Workplace:
    """A folder with a config for two nodes of one CPU rank each, and the scripts of cluster/."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.runs, self.root = folder, folder / "runs", ROOT
        self.profile = folder / "profile.yaml"
        self.config = folder / "tiny.yaml"
        tree = {
            **TINY,
            "data": {**TINY["data"], "path": str(data)},
            "log": {"every": {"steps": 1}, "wandb": "disabled"},
        }
        tree["train"] = {**TINY["train"], "duration": {"steps": STEPS}}
        tree["checkpoint"] = {"every": {"steps": 20}}
        cluster = {"nodes": 2, "gpus_per_node": 0, "cpus_per_task": 1, "time": "30", "env": {"OMP_NUM_THREADS": 1}}
        self.config.write_text(yaml.safe_dump({**tree, "cluster": cluster}))
        self.profile.write_text(yaml.safe_dump(cluster))

    def call(self, script: str, *arguments: str, code: int = 0, **environment: str) -> str:
        """The output of a script of cluster/; asserts its exit code."""
        answer = forkserver.run(
            [sys.executable, str(ROOT / "cluster" / script), *arguments],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={**os.environ, **environment},
            timeout=PATIENCE_S,
            check=False,
        )
        assert answer.returncode == code, answer.stdout + answer.stderr
        return answer.stdout + answer.stderr

    def launch(self, *arguments: str, code: int = 0) -> str:
        return self.call("launch.py", "--config", str(self.config), *arguments, code=code)

    def train_undisturbed(self, name: str) -> None:
        """The same run under torchrun, on as many ranks."""
        arguments = ["--config", str(self.config), "--runs", str(self.runs), f"name={name}"]
        process = launch(2, "-m", "dico_t2i", "train", *arguments, fork=False)
        output, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, output

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return dict(read_weights(newest_checkpoint(self.runs / name / "checkpoints"), "weight"))


@pytest.fixture
def workplace(tmp_path, shapes_data) -> Workplace:
    return Workplace(tmp_path, shapes_data)


def job_id(output: str) -> str:
    return re.search(r"^job (\S+):", output, re.MULTILINE)[1]


def until(happened, what: str, patience_s: float = PATIENCE_S):
    deadline = time.monotonic() + patience_s
    while not (result := happened()):
        assert time.monotonic() < deadline, f"did not happen: {what}\n{commands_state()}"
        time.sleep(0.5)
    return result


def commands_state() -> str:
    return subprocess.run("squeue; sinfo", shell=True, capture_output=True, text=True, check=False).stdout


def state_of(job: str) -> str:
    return next(iter(commands.jobs([job]))).state


def test_a_run_stopped_in_every_way_ends_bit_equal(slurm, workplace):
    output = workplace.launch("--signal-lead", "55")
    job, run = job_id(output), workplace.runs / "tiny"
    assert str(run) in output

    def reached(step):
        until(lambda: read_state(run).step >= step, f"step {step}")

    def restarted(times):
        until(lambda: read_state(run).restarts == times, f"restart {times}")

    reached(40)
    refused = workplace.launch(code=2)
    assert f"job {job} (RUNNING" in refused
    shown = workplace.call("status.py", "--folder", "runs", "--json")
    assert json.loads(shown)[0]["job_state"] == "RUNNING"
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    restarted(1)
    reached(read_state(run).step + 30)
    subprocess.run(["scontrol", "requeue", job], check=True)
    restarted(2)
    reached(read_state(run).step + 30)
    subprocess.run(["scontrol", "update", f"JobId={job}", "TimeLimit=1"], check=True)
    until(lambda: state_of(job) in ("PENDING", "COMPLETED"), "requeue at the time limit")
    subprocess.run(["scontrol", "update", f"JobId={job}", "TimeLimit=30"], check=True)
    restarted(3)
    reached(read_state(run).step + 30)
    slurm.kill_node("n2", steps=True)
    until(lambda: state_of(job) != "RUNNING", "the end of the job whose node is gone")
    slurm.start_node("n2")
    until(lambda: state_of(job) == "COMPLETED", "the end")

    events = [line["event"] for line in json_lines(run / "metrics.jsonl") if "event" in line]
    assert events.count("start") == 5
    assert events.count("stop") >= 2  # the signal and the time limit were told to the ranks
    assert len(list((run / "starts").glob("*.json"))) == 5
    started = json.loads((run / "starts" / "0000.json").read_text())
    assert "launch.py" in started["command"]
    assert started["packages"]["torch"] == torch.__version__.split("+")[0]
    workplace.train_undisturbed("whole")
    whole, parts = workplace.weights("whole"), workplace.weights("tiny")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    losses = {
        line["step"]: line["loss"] for line in json_lines(workplace.runs / "whole/metrics.jsonl") if "loss" in line
    }
    assert all(losses[line["step"]] == line["loss"] for line in json_lines(run / "metrics.jsonl") if "loss" in line)


def test_the_log_says_what_slurm_did(slurm, workplace):
    output = workplace.launch("train.duration.steps=100000")
    job, run = job_id(output), workplace.runs / "tiny"
    log = Path(re.search(r"job's log: +(\S+)", output)[1])
    until(lambda: read_state(run).step >= 20, "step 20")
    subprocess.run(["scontrol", "requeue", job], check=True)
    until(lambda: read_state(run).restarts == 1, "the requeue")
    until(lambda: read_state(run).step >= 40, "step 40")
    assert "requeued by SLURM" in log.read_text()
    assert "cancelled" not in log.read_text()
    subprocess.run(["scancel", job], check=True)
    until(lambda: not next(iter(commands.jobs([job]))).active, "the end")
    assert "cancelled (scancel); launch again to resume" in log.read_text()
    assert not (run / "failures.jsonl").exists()


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
