"""The script for those without submitit: SLURM takes it, and its run comes back after a signal."""

import os
import subprocess
import sys
from pathlib import Path

from dico_t2i.runs.log import json_lines
from tests.cluster.workplace import ROOT, state_of, until

SCRIPT = ROOT / "cluster" / "sbatch_example.sh"


def sbatch(*arguments: str, **options) -> str:
    """What sbatch says."""
    environment = {
        **os.environ,
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    environment |= {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        ["sbatch", *arguments], capture_output=True, text=True, env=environment, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_slurm_takes_it_as_it_stands(large_slurm):
    assert "to start at" in sbatch("--test-only", str(SCRIPT), "configs/dico_xl_t2i.yaml", cwd=ROOT)


def test_a_run_comes_back_after_a_signal_and_ends(slurm, workplace):
    size = ["--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10"]
    arguments = [str(workplace.config), "train.duration.steps=60"]
    job = sbatch("--parsable", *size, str(SCRIPT), *arguments, cwd=workplace.folder).strip()
    metrics = workplace.runs / "tiny" / "metrics.jsonl"

    def events(kind):
        return [line for line in json_lines(metrics) if line.get("event") == kind] if metrics.exists() else []

    def reports():
        return [line for line in json_lines(metrics) if "loss" in line] if metrics.exists() else []

    until(lambda: len(reports()) > 3, "some steps")
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    until(lambda: len(events("start")) == 2, "the second start")
    until(lambda: state_of(job) == "COMPLETED", "the end")
    assert len(events("stop")) == len(events("done")) == 1
    steps = [line["step"] for line in reports()]
    assert steps == list(range(1, 61))
