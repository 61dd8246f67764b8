"""Faults of a job on sixteen nodes (in the short form four and three), each through the launcher and the supervisor.

What every rank was given to train on is recorded, as in tests/faults. In what the run's weights are made of, each
position of the data order must be there once, with the sample that a run left alone has there.
"""

import os
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cluster.state import complete_checkpoints, holder, read_state
from dico_t2i.runs.log import json_lines
from tests.cluster.conftest import started
from tests.cluster.workplace import Workplace, job_id, state_of, until
from tests.ports import free_port

BATCH, EVERY = 48, 5  # 48 is divisible by 16, 12 and 8 ranks, and by 4, 3 and 2
RECORD = """
import os
if "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ:
    from pathlib import Path
    from tests.faults.rank import _record_batches
    start = f"{int(os.environ['SLURM_JOB_ID']):06d}-{int(os.environ.get('SLURM_RESTART_COUNT', 0)):03d}"
    _record_batches(Path(__file__).parent.parent / "given" / f"{start}-{os.environ['SLURM_PROCID']}.jsonl")
"""


class Sixteen(Workplace):
    """A workplace whose jobs take all nodes of a SLURM, and whose ranks record what they are given."""

    def __init__(self, folder: Path, data: Path, python: Path, nodes: int, steps: int) -> None:
        super().__init__(folder, data, python)
        self.nodes, self.steps, self.python = nodes, steps, python
        (folder / "record").mkdir()
        (folder / "given").mkdir()
        (folder / "record" / "sitecustomize.py").write_text(RECORD)
        tree = yaml.safe_load(self.config.read_text())
        tree["cluster"] |= {"nodes": nodes, "env": {"OMP_NUM_THREADS": 1, "PYTHONPATH": str(folder / "record")}}
        tree["data"] |= {"streams": BATCH, "workers": 0}
        tree["train"] |= {"global_batch": BATCH, "micro_batch": BATCH, "duration": {"steps": steps}}
        tree["checkpoint"] = {"every": {"steps": EVERY}}
        self.config.write_text(yaml.safe_dump(tree))

    def call(self, script: str, *arguments: str, code: int = 0, **environment: str) -> str:
        """As in a workplace, by the Python of the jobs."""
        answer = self.start(script, *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output, _ = answer.communicate(timeout=600)
        assert answer.returncode == code, output
        return output

    def start(self, script: str, *arguments: str, **streams: Any) -> subprocess.Popen:
        """Start a script of cluster/."""
        return subprocess.Popen(
            [str(self.python), str(self.root / "cluster" / script), *arguments], cwd=self.folder, **streams
        )

    def launch(self, *arguments: str, code: int = 0) -> str:
        return super().launch(f"train.duration.steps={self.steps}", *arguments, code=code)

    @property
    def run(self) -> Path:
        return self.runs / "tiny"

    def reached(self, more: int) -> None:
        """Wait until the run has made some steps from here on."""
        step = read_state(self.run).step + more
        until(lambda: read_state(self.run).step >= step, f"step {step}", 600)

    def restarted(self, times: int) -> None:
        until(lambda: read_state(self.run).restarts == times, f"restart {times}", 600)

    def ended(self, job: str, state: str) -> None:
        until(lambda: state_of(job) == state, state, 600)

    def given(self) -> list[dict[int, Counter[tuple[int, str]]]]:
        """Of each start, oldest first: step -> (position, key) -> how often it was trained on."""
        found: dict[str, dict[int, Counter[tuple[int, str]]]] = {}
        for path in sorted((self.folder / "given").glob("*.jsonl")):
            steps = found.setdefault(path.name.rpartition("-")[0], {})
            for line in json_lines(path):
                pairs = zip(line["positions"], line["keys"], strict=True)
                steps.setdefault(line["positions"][0] // BATCH, Counter()).update(pairs)
        return [found[start] for start in sorted(found)]

    def assert_all_once(self) -> int:
        """Assert that each sample was trained on once, and is the right one; returns the number of steps made again."""
        starts = [start for start in self.given() if start]
        kept: dict[int, Counter[tuple[int, str]]] = {}
        for start, following in zip(starts, [*starts[1:], {}], strict=True):
            kept |= {step: samples for step, samples in start.items() if step < min(following, default=self.steps)}
        alone = Counter(pair for step in self._alone().values() for pair in step)
        assert sorted(kept) == list(range(self.steps))
        assert sum(kept.values(), Counter()) == alone
        assert len(alone) == self.steps * BATCH
        assert set(alone.values()) == {1}
        return sum(map(len, starts)) - self.steps

    def _alone(self) -> dict[int, list[tuple[int, str]]]:
        """What one process that is left alone is given, by step."""
        folder = self.folder / "alone"
        folder.mkdir()
        command = [str(self.python), "-m", "tests.faults.rank", str(folder), "0", "0"]
        command += ["train", "--config", str(self.config)]
        place = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        done = subprocess.run(
            [*command, "--runs", str(folder), "name=alone", f"train.duration.steps={self.steps}"],
            env={**os.environ, **place},
            cwd=self.root,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        lines = json_lines(folder / "rank-0.jsonl")
        return {n: list(zip(line["positions"], line["keys"], strict=True)) for n, line in enumerate(lines)}

    def losses_of_one(self) -> dict[int, float]:
        """The losses of ``_alone``."""
        return {
            line["step"]: line["loss"]
            for line in json_lines(self.folder / "alone" / "alone" / "metrics.jsonl")
            if "loss" in line
        }

    def assert_bit_equal(self) -> None:
        """Assert the losses and weights of a run on as many nodes that nothing disturbed."""
        self.ended(job_id(self.launch("name=whole")), "COMPLETED")
        losses = dict(self._losses("whole"))
        assert all(losses[step] == loss for step, loss in self._losses("tiny"))
        whole, disturbed = self._weights("whole"), self._weights("tiny")
        assert all(torch.equal(whole[key], disturbed[key]) for key in whole)


@pytest.fixture(scope="module")
def size(long) -> int:
    return 16 if long else 4


@pytest.fixture(scope="module")
def nodes(short_folder, size):
    """A SLURM of one CPU a node; SLURM's commands find it."""
    before = os.environ.get("SLURM_CONF")
    sandbox = started(short_folder / "many", nodes=size, cpus=1)
    os.environ.update(sandbox.environment)
    yield sandbox
    sandbox.stop()
    os.environ.pop("SLURM_CONF")
    if before:
        os.environ["SLURM_CONF"] = before


@pytest.fixture
def place(tmp_path, shapes_data, quick_python, size, long) -> Sixteen:
    return Sixteen(tmp_path, shapes_data, quick_python, size, 40 if long else 12)


def rank_on(sandbox, node: str) -> int:
    """The process of the rank on a node: what srun started there."""
    return next(
        pid
        for pid in sandbox.job_processes(node)
        if _command(pid).count("cluster.rank") and "srun" not in _command(pid)
    )


def supervisor_on(sandbox, node: str) -> int:
    return next(pid for pid in sandbox.job_processes(node) if "submitit.core._submit" in _command(pid))


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


@pytest.mark.long
def test_a_run_broken_in_every_way_ends_bit_equal(nodes, place, size):
    """Kills of a rank, of a controller, of a node that comes back late, and of the supervisor."""
    job = job_id(place.launch())
    place.reached(EVERY + 2)
    assert f"job {job} (RUNNING" in place.launch(code=2)  # a second job is refused
    os.kill(rank_on(nodes, f"n{size - 1}"), signal.SIGKILL)
    place.restarted(1)  # by the supervisor
    failures = list(json_lines(place.run / "failures.jsonl"))
    assert len(failures) == 1

    place.reached(2)
    nodes.kill_controller()
    place.reached(3)  # jobs do not need it while they run
    nodes.start_controller()
    place.reached(2)

    lost = f"n{size // 2}"
    nodes.kill_node(lost, steps=True)
    until(lambda: state_of(job) == "PENDING", "the requeue by SLURM", 300)
    nodes.start_node(lost)
    place.restarted(2)
    place.reached(EVERY + 1)

    os.kill(supervisor_on(nodes, "n1"), signal.SIGKILL)
    until(lambda: state_of(job) not in ("RUNNING", "COMPLETING"), "the end of the job without supervisor", 300)
    assert state_of(job) == "FAILED"  # SLURM does not requeue what ends by itself
    until(lambda: not holder(place.run), "the end of rank 0", 300)
    second = job_id(place.launch())
    place.ended(second, "COMPLETED")

    assert read_state(place.run).step == place.steps
    again = place.assert_all_once()
    print(f"steps made again: {again}")
    assert again <= 3 * 2 * EVERY
    place.assert_bit_equal()


@pytest.mark.long
def test_a_daemon_that_dies_alone(nodes, place, size):
    """A slurmd is killed, but not the rank on its node, which still holds the run when the job is requeued."""
    job = job_id(place.launch())
    place.reached(EVERY + 2)
    nodes.kill_node("n1")  # the node of rank 0 and of the supervisor
    until(lambda: state_of(job) != "RUNNING", "SLURM's notice", 300)
    nodes.start_node("n1")
    place.ended(job, "COMPLETED")
    assert place.assert_all_once() <= 2 * EVERY
    place.assert_bit_equal()


@pytest.mark.long
def test_of_two_jobs_on_one_run_folder_one_trains(nodes, place, size):
    """The launcher refuses the second job; if it does not know of the first, one of both does not get the lock."""
    half = ("--nodes", str(size // 2))
    first = job_id(place.launch("cluster.sbatch={begin: now+1hour}", *half))
    assert f"job {first} (PENDING" in place.launch(*half, code=2)
    submitted = place.run / "jobs" / "submitted.jsonl"
    submitted.rename(submitted.with_suffix(".away"))
    second = job_id(place.launch(*half))
    subprocess.run(["scontrol", "update", f"JobId={first}", "StartTime=now"], check=True)
    jobs = (first, second)
    until(lambda: {"COMPLETED", "FAILED"} == set(map(state_of, jobs)), "the end of both", 600)
    failed = next(job for job in jobs if state_of(job) == "FAILED")
    assert "in use by another job (process" in (place.run / "jobs" / f"{failed}_0_log.out").read_text()
    assert read_state(place.run).step == place.steps
    assert place.assert_all_once() == 0


def test_a_run_is_requeued_on_fewer_nodes_and_on_more(nodes, place, size):
    """16, 12, 8 and 16 nodes, of one job, changed while it waits; the launcher is killed, too."""
    steps, nowhere = f"train.duration.steps={place.steps}", subprocess.DEVNULL
    watching = place.start(
        "launch.py", "--config", str(place.config), "--follow", steps, stdout=nowhere, stderr=nowhere
    )
    submitted = place.run / "jobs" / "submitted.jsonl"
    until(lambda: submitted.exists() and list(json_lines(submitted)), "the submission", 300)
    job = next(iter(json_lines(submitted)))["job"]
    until(lambda: complete_checkpoints(place.run), "a checkpoint", 600)
    watching.kill()
    watching.wait()
    for number, share in enumerate((12, 8, 16) if size == 16 else (3,)):
        subprocess.run(["scontrol", "requeuehold", job], check=True)
        fewer = f"NumCPUs={share} NumTasks={share} NumNodes={share}-{share}".split()
        update = ["scontrol", "update", f"JobId={job}", *fewer]
        until(lambda: subprocess.run(update, check=False).returncode == 0, "a change of its nodes")  # noqa: B023
        subprocess.run(["scontrol", "release", job], check=True)
        place.restarted(number + 1)
        place.reached(2)
    place.ended(job, "COMPLETED")
    assert place.assert_all_once() <= 3 * 2 * EVERY
    ranks = [line["ranks"] for line in json_lines(place.run / "metrics.jsonl") if line.get("event") == "start"]
    assert ranks == ([16, 12, 8, 16] if size == 16 else [4, 3])
    alone = place.losses_of_one()
    for step, loss in place._losses("tiny"):
        assert abs(loss - alone[step]) <= 1e-5 * alone[step]
