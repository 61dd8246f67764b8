"""Real runs: tiny models on tiny shapes, as processes of their own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_prep import shapes
from tests.forkserver import Popen
from tests.ports import free_port

TINY = {
    "name": "tiny",
    "model": {
        "hidden_size": 8,
        "depths": [1, 1, 1, 1, 1],
        "mlp_ratio": 2,
        "in_channels": 3,
        "condition": "text",
        "text_dim": 32,
        "pooled_text": True,
        "pooled_dim": 32,
    },
    "autoencoder": {"kind": "pixels"},
    "text_encoder": {"kind": "transformers", "weights": "seeded", "seeded": {"width": 32, "layers": 1, "heads": 2}},
    "data": {"image_size": 16, "flip": False, "streams": 4, "workers": 1},
    "optimizer": {"lr": 1e-3, "ema": [0.9, 0.99], "clip": 1.0, "warmup": {"steps": 3}},
    "train": {"duration": {"steps": 8}, "global_batch": 8, "micro_batch": 4, "precision": "fp32", "zero_stage": 1},
    "checkpoint": {"every": {"steps": 100}},
    "log": {"every": {"steps": 1}, "wandb": "disabled"},
}


def launch(ranks: int, *command: str, fork: bool = True, **options) -> subprocess.Popen:
    """Start a module or script on several ranks under torchrun, output to a pipe; forked, or as a user starts it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    torchrun += ["--master-port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = Popen if fork else subprocess.Popen
    return start(
        [*(torchrun if ranks > 1 else [sys.executable]), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        **options,
    )


class Runs:
    """A folder of runs, and the means to start them."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        self.config = folder / "tiny.yaml"
        self.config.write_text(yaml.safe_dump({**TINY, "data": {**TINY["data"], "path": str(data)}}))

    def command(self, name: str, *overrides: str) -> list[str]:
        base = ["-m", "dico_t2i", "train", "--config", str(self.config), "--runs", str(self.folder)]
        return [*base, f"name={name}", *overrides]

    def train(self, name: str, *overrides: str, ranks: int = 1, code: int = 0, fork: bool = True) -> str:
        """Train to the end; returns the output. Asserts the exit code."""
        process = launch(ranks, *self.command(name, *overrides), fork=fork)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == code, output
        return output

    def stop_at(self, step: int, name: str, *overrides: str, ranks: int = 1) -> str:
        """Train, send SIGTERM once a step is logged; returns the output."""
        process = launch(ranks, *self.command(name, *overrides))
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith(f"step {step} "):
                process.send_signal(signal.SIGTERM)
        process.wait(timeout=300)
        return "".join(lines)

    def metrics(self, name: str) -> list[dict]:
        text = (self.folder / name / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def losses(self, name: str) -> dict[int, float]:
        """Step -> loss; of a step logged twice, the last."""
        return {m["step"]: m["loss"] for m in self.metrics(name) if "loss" in m}


@pytest.fixture(scope="session")
def shapes_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "data"
    shapes.main(["--out", str(folder), "--samples", "64", "--size", "16", "--samples-per-shard", "24"])
    return folder


@pytest.fixture
def runs(tmp_path, shapes_data) -> Runs:
    return Runs(tmp_path, shapes_data)
