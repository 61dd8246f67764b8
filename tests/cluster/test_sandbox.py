"""The sandbox itself: jobs run, come back, and nothing is left."""

import re
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import started


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def until(happened, patience_s: float = 60):
    deadline = time.monotonic() + patience_s
    while not happened():
        assert time.monotonic() < deadline, ask("squeue") + ask("sinfo")
        time.sleep(0.2)


def users_of(folder: Path) -> list[str]:
    """The processes that have a file of the folder open; slurmstepd names its folder nowhere else."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.readlink().is_relative_to(folder):
                found.add(link.parts[2])
        except OSError:  # it ended meanwhile
            continue
    return sorted(found)


def test_a_job_runs_on_two_nodes_and_again_when_requeued(slurm, tmp_path):
    output = tmp_path / "out"
    script = f"srun sh -c 'echo $SLURM_NODEID $SLURM_RESTART_COUNT >> {output}'; [ $SLURM_RESTART_COUNT ] || sleep 100"
    job = re.search(r"\d+", ask("sbatch", "--nodes=2", "--output=/dev/null", "--wrap", script))[0]
    until(lambda: output.exists() and len(output.read_text().splitlines()) == 2)
    ask("scontrol", "requeue", job)
    until(lambda: "COMPLETED" in ask("scontrol", "show", "job", job))
    assert sorted(output.read_text().splitlines()) == ["0", "0 1", "1", "1 1"]


@pytest.mark.long
def test_a_job_whose_node_dies_runs_again(slurm, tmp_path):
    output = tmp_path / "out"
    script = f"hostname >> {output}; [ $SLURM_RESTART_COUNT ] || sleep 100"
    job = re.search(r"\d+", ask("sbatch", "--nodelist=n2", "--output=/dev/null", "--wrap", script))[0]
    until(lambda: output.exists())
    slurm.kill_node("n2", steps=True)
    until(lambda: "JobState=RUNNING" not in ask("scontrol", "show", "job", job))
    slurm.start_node("n2")
    until(lambda: "COMPLETED" in ask("scontrol", "show", "job", job))
    assert len(output.read_text().splitlines()) == 2


def test_sixteen_nodes_of_eight_gpus_are_believed(large_slurm, tmp_path):
    wide = ["sbatch", "--test-only", "--nodes=16", "--gpus-per-node=8", "--cpus-per-task=12", "--ntasks-per-node=8"]
    subprocess.run([*wide, "--wrap", "true"], check=True)
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run([*wide, "--gpus-per-node=9", "--wrap", "true"], check=True)


def test_nothing_is_left_running(short_folder, monkeypatch):
    sandbox = started(short_folder / "left")
    monkeypatch.setenv("SLURM_CONF", str(sandbox.conf))
    ask("sbatch", "--nodes=2", "--output=/dev/null", "--wrap", "srun sleep 4711")
    until(lambda: "sleep 4711" in ask("ps", "-ef"))
    assert len(users_of(sandbox.folder)) >= 7  # the four daemons, and slurmstepd of the batch script and of each task
    sandbox.stop()
    assert users_of(sandbox.folder) == []
    assert "sleep 4711" not in ask("ps", "-ef")
    sandbox.stop()
