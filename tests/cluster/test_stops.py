"""Jobs on a real SLURM that are stopped in every way; in a file of their own, because they take minutes."""

import json
import re
import subprocess
from pathlib import Path

import torch

from cluster import slurm as commands
from cluster.state import read_state
from dico_t2i.runs.log import json_lines
from tests.cluster.workplace import job_id, state_of, until


def test_a_run_stopped_in_every_way_ends_bit_equal(slurm, workplace):
    workplace.slow_down(0.2)  # SLURM looks for time limits twice a minute only
    output = workplace.launch("--signal-lead", "55")
    job, run = job_id(output), workplace.runs / "tiny"
    assert str(run) in output

    def reached(step):
        until(lambda: read_state(run).step >= step, f"step {step}")

    def restarted(times):
        until(lambda: read_state(run).restarts == times, f"restart {times}")

    reached(20)
    refused = workplace.launch(code=2)
    assert f"job {job} (RUNNING" in refused
    shown = workplace.call("status.py", "--folder", "runs", "--json")
    assert json.loads(shown)[0]["job_state"] == "RUNNING"
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    restarted(1)
    reached(read_state(run).step + 15)
    subprocess.run(["scontrol", "requeue", job], check=True)
    restarted(2)
    reached(read_state(run).step + 15)
    subprocess.run(["scontrol", "update", f"JobId={job}", "TimeLimit=1"], check=True)
    until(lambda: state_of(job) in ("PENDING", "COMPLETED"), "requeue at the time limit")
    subprocess.run(["scontrol", "update", f"JobId={job}", "TimeLimit=30"], check=True)
    restarted(3)
    reached(read_state(run).step + 15)
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
    workplace.assert_undisturbed("tiny")


def test_the_log_says_what_slurm_did(slurm, workplace):
    output = workplace.launch("train.duration.steps=100000")
    job, run = job_id(output), workplace.runs / "tiny"
    log = Path(re.search(r"job's log: +(\S+)", output)[1])
    until(lambda: read_state(run).step >= 10, "step 10")
    subprocess.run(["scontrol", "requeue", job], check=True)
    until(lambda: read_state(run).restarts == 1, "the requeue")
    until(lambda: read_state(run).step >= 30, "step 30")
    assert "requeued by SLURM" in log.read_text()
    assert "cancelled" not in log.read_text()
    subprocess.run(["scancel", job], check=True)
    until(lambda: not next(iter(commands.jobs([job]))).active, "the end")
    assert "cancelled (scancel); launch again to resume" in log.read_text()
    assert not (run / "failures.jsonl").exists()
