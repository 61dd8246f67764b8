"""A folder from which jobs are launched, and waiting for what becomes of them."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from cluster import slurm as commands
from dico_t2i.runs.checkpoint import newest_checkpoint, read_weights
from dico_t2i.runs.log import json_lines
from tests import forkserver
from tests.training.conftest import TINY, launch

ROOT = Path(__file__).resolve().parents[2]
STEPS = 260
PATIENCE_S = 240
SLOW = """
import os
if "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ:
    import time
    from dico_t2i.training.ahead import Ahead
    take = Ahead.take
    Ahead.take = lambda ahead: time.sleep({seconds}) or take(ahead)
"""


class Workplace:
    """A folder with a config for two nodes of one CPU rank each, and the scripts of cluster/."""

    def __init__(self, folder: Path, data: Path, python: Path) -> None:
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
        cluster = {"nodes": 2, "gpus_per_node": 0, "cpus_per_task": 1, "time": "30", "python": str(python)}
        cluster["env"] = {"OMP_NUM_THREADS": 1}
        self.config.write_text(yaml.safe_dump({**tree, "cluster": cluster}))
        self.profile.write_text(yaml.safe_dump(cluster))

    def slow_down(self, seconds: float) -> None:
        """Let the ranks of jobs wait before each step, so that a time limit comes before the end of a short run."""
        folder = self.folder / "slow"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(SLOW.format(seconds=seconds))
        tree = yaml.safe_load(self.config.read_text())
        tree["cluster"]["env"]["PYTHONPATH"] = str(folder)
        self.config.write_text(yaml.safe_dump(tree))

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

    def assert_undisturbed(self, name: str) -> None:
        """Assert that a run has the weights and losses of the same run under torchrun, on as many ranks."""
        process = launch(
            2, "-m", "dico_t2i", "train", "--config", str(self.config), "--runs", str(self.runs), "name=whole"
        )
        output, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, output
        whole, disturbed = self._weights("whole"), self._weights(name)
        assert all(torch.equal(whole[key], disturbed[key]) for key in whole)
        losses = dict(self._losses("whole"))
        assert all(losses[step] == loss for step, loss in self._losses(name))

    def _weights(self, name: str) -> dict[str, torch.Tensor]:
        return dict(read_weights(newest_checkpoint(self.runs / name / "checkpoints"), "weight"))

    def _losses(self, name: str) -> list[tuple[int, float]]:
        lines = json_lines(self.runs / name / "metrics.jsonl")
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]


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
