"""Break real runs on purpose and compare what comes out with a run that was left alone.

A *job* is one start of a run: as many processes as ranks, each of which calls the ``dico train`` command. A job is
killed, stopped or ends; the next job of the same run goes on. The ranks are forks (``tests.forkserver``), so that a
start takes a second or two. What a rank is given to train on is recorded on the way.

As a program, the long form: ``python -m tests.faults.harness --kills 300 --ranks 4``.
"""

import argparse
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from dico_t2i.data.writer import ShardWriter
from dico_t2i.runs import checkpoint as ckpt
from tests.forkserver import Popen
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120  # for anything that should take seconds
GLOBAL_BATCH = 8

# Nothing here needs a text encoder: its import would take longer than everything else of a start.
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "hidden_size": 8,
        "depths": [1, 1, 1, 1, 1],
        "mlp_ratio": 2,
        "in_channels": 3,
        "condition": "class",
        "num_classes": 4,
    },
    "autoencoder": {"kind": "pixels"},
    "data": {"image_size": 8, "streams": 4, "workers": 0},
    "optimizer": {"lr": 1e-3, "ema": [0.9, 0.99], "clip": 1.0, "warmup": {"steps": 3}, "schedule": "cosine"},
    "train": {
        "duration": {"steps": 12},
        "global_batch": GLOBAL_BATCH,
        "micro_batch": 4,  # with two ranks one pass a step, with one rank two
        "precision": "fp32",
        "zero_stage": 1,
    },
    "checkpoint": {"every": {"steps": 3}, "keep_last": 3},
    "log": {"every": {"steps": 1}, "wandb": "disabled"},
}


@dataclass(frozen=True)
class OwnDeath:
    """A rank kills itself, with SIGKILL, before its n-th operation on files of a save."""

    rank: int
    operation: int


class Job:
    """One start of a run."""

    def __init__(
        self,
        folder: Path,
        arguments: list[str],
        ranks: int,
        death: OwnDeath | None = None,
        roots: Sequence[Path] | None = None,
        batches: int = 0,
    ) -> None:
        """roots: for each rank its own folder of runs, as on nodes without a shared file system. batches: the number
        of micro-batches after which the ranks wait to be killed, so that no run is too fast for a test; 0 for none.
        """
        self.folder = folder
        folder.mkdir(parents=True)
        place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        place |= {"COLUMNS": "1000", "OMP_NUM_THREADS": "1"}
        self.ranks: list[Popen] = []
        for rank in range(ranks):
            dies_before = str(death.operation if death and death.rank == rank else 0)
            command = [sys.executable, "-m", "tests.faults.rank", str(folder), dies_before, str(batches), *arguments]
            command += ["--runs", str(roots[rank])] if roots else []
            own = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (folder / f"rank-{rank}.txt").open("wb") as output:
                self.ranks.append(Popen(command, cwd=ROOT, env=own, stdout=output, stderr=output))

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.pid(rank), number)

    def pid(self, rank: int) -> int:
        return self.ranks[rank].pid

    def kill(self) -> None:
        """SIGKILL to every rank that is left, and wait for their end."""
        for process in self.ranks:
            process.kill()
        self.wait()

    def wait(self, patience_s: float = PATIENCE_S) -> list[int]:
        """The exit codes, when all ranks have ended; a negative one is the signal that killed."""
        deadline = time.monotonic() + patience_s
        for rank, process in enumerate(self.ranks):
            try:
                process.wait(max(0, deadline - time.monotonic()))
            except TimeoutExpired:
                output = self.output
                for other in self.ranks:
                    other.kill()
                raise TimeoutError(f"rank {rank} (process {process.pid}) does not end:\n{output[-4000:]}") from None
        return [process.wait() for process in self.ranks]

    def until(self, happened: Callable[[], object]) -> None:
        """Wait for something that the running job does. Raises RuntimeError with its output if it ends before."""
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            if any(process.poll() is not None for process in self.ranks):
                if happened():
                    return
                raise RuntimeError(f"the job ended before it: {[p.poll() for p in self.ranks]}\n{self.output}")
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"did not happen:\n{self.output}")
            time.sleep(0.01)

    @property
    def output(self) -> str:
        """What all ranks printed."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("rank-*.txt")))

    @property
    def start_step(self) -> int | None:
        """The step of the checkpoint that this job loaded, 0 for none; None if training did not begin."""
        if not (self.folder / "rank-0.jsonl").exists():
            return None
        loaded = re.findall(r"resumed from .*step-(\d+)", (self.folder / "rank-0.txt").read_text())
        return int(loaded[0]) if loaded else 0

    @property
    def last_step(self) -> int:
        """The last step that any rank began; 0 before the first."""
        return max((step for step, _ in self.batches()), default=0)

    def batches(self) -> Iterator[tuple[int, list[tuple[int, str]]]]:
        """What the ranks were given, by micro-batch: the step it was for, and (position, key) of its samples."""
        first = (self.start_step or 0) + 1
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            for number, batch in enumerate(_json_lines(path)):
                accumulation = GLOBAL_BATCH // (len(self.ranks) * len(batch["positions"]))
                yield first + number // accumulation, list(zip(batch["positions"], batch["keys"], strict=True))


class Run:
    """A run and all its jobs."""

    def __init__(self, root: Path, data: Path, name: str, *overrides: str) -> None:
        self.root, self.name, self.overrides = root, name, overrides
        self.path = root / name
        self.checkpoints = self.path / "checkpoints"
        self.jobs: list[Job] = []
        root.mkdir(parents=True, exist_ok=True)
        self.config = root / f"{name}.yaml"
        tree = {**CONFIG, "name": name, "data": {**CONFIG["data"], "path": str(data)}}
        self.config.write_text(yaml.safe_dump(tree))

    def start(
        self,
        *overrides: str,
        ranks: int = 2,
        death: OwnDeath | None = None,
        roots: Sequence[Path] | None = None,
        batches: int = 0,
    ) -> Job:
        arguments = ["train", "--config", str(self.config), "--runs", str(self.root), *self.overrides, *overrides]
        job = Job(self.root / f"{self.name}.jobs" / f"{len(self.jobs):04d}", arguments, ranks, death, roots, batches)
        self.jobs.append(job)
        return job

    def train(self, *overrides: str, ranks: int = 2, code: int = 0, patience_s: float = PATIENCE_S) -> str:
        """Run a job to its end; returns the output. Asserts the exit codes."""
        job = self.start(*overrides, ranks=ranks)
        codes = job.wait(patience_s)
        assert codes == [code] * ranks, f"{codes}\n{job.output}"
        return job.output

    def metrics(self) -> list[dict[str, Any]]:
        return list(_json_lines(self.path / "metrics.jsonl"))

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.metrics() if line.get("event") == kind]

    def losses(self) -> dict[int, float]:
        """Step -> loss; of a step done twice, the last."""
        return {line["step"]: line["loss"] for line in self.metrics() if "loss" in line}

    def reached(self, step: int) -> bool:
        """Whether the last line of metrics with a loss is of this step or a later one."""
        lines = [line for line in _json_lines(self.path / "metrics.jsonl", tail=4096) if "loss" in line]
        return bool(lines) and lines[-1]["step"] >= step

    def saves(self) -> int:
        """How many checkpoints have their manifest, which is written last; none is read."""
        return len(list(self.checkpoints.glob("step-*/manifest.json")))

    def valid_steps(self) -> list[int]:
        """The steps of the checkpoints that are whole, oldest first; every file is read."""
        steps = []
        for path in sorted(self.checkpoints.glob("step-*")):
            try:
                checkpoint = ckpt.open_checkpoint(path)
                ckpt.verify(checkpoint)
            except ckpt.CheckpointError:
                continue
            steps.append(checkpoint.step)
        return steps

    def state(self) -> dict[str, torch.Tensor]:
        """All that the newest checkpoint holds: weights, moments and averages, whole, by kind and parameter."""
        checkpoint = ckpt.open_checkpoint(self.checkpoints / f"step-{self.valid_steps()[-1]:08d}")
        return {
            f"{kind}:{name}": value for kind in checkpoint.kinds for name, value in ckpt.read_weights(checkpoint, kind)
        }

    def shards(self) -> list[dict[str, torch.Tensor]]:
        """All that the newest checkpoint holds, by rank."""
        return [load_file(file) for file in sorted(ckpt.newest_checkpoint(self.checkpoints).path.glob("*.safetensors"))]

    def assert_same_shards(self, other: "Run") -> None:
        """Assert that the newest checkpoints of two runs hold the same, bit by bit."""
        for ours, theirs in zip(self.shards(), other.shards(), strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    def assert_same(self, other: "Run") -> None:
        """Assert that two runs have the same losses and the same newest checkpoints, bit by bit."""
        assert self.losses() == other.losses()
        self.assert_same_shards(other)

    def history(self) -> dict[int, Counter[tuple[int, str]]]:
        """Step -> (position, key) -> how often it was trained on, in what the run's weights are made of.

        What a job did after the step that the next one went on from is lost work, done again, and not counted.
        """
        jobs = [job for job in self.jobs if job.start_step is not None]
        seen: dict[int, Counter[tuple[int, str]]] = {}
        for job, following in zip(jobs, [*jobs[1:], None], strict=True):
            last = following.start_step if following else None
            for step, samples in job.batches():
                if last is None or step <= last:
                    seen.setdefault(step, Counter()).update(samples)
        return seen


@dataclass
class Report:
    """What a run under kills came to, against the same run left alone."""

    ranks: int
    kills: int = 0
    in_start: int = 0  # before the first batch
    in_save: int = 0  # a checkpoint was left unfinished
    jobs: int = 0
    steps: int = 0
    redone: int = 0  # steps done again because a kill came before their checkpoint
    lost: int = 0  # batches
    repeated: int = 0  # batches
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.ranks} ranks, {self.steps} steps in {self.jobs} jobs, {self.seconds:.0f} s\n"
            f"kills survived: {self.kills} ({self.in_start} before the first batch, {self.in_save} inside a save)\n"
            f"batches lost: {self.lost}\nbatches repeated: {self.repeated}\nsteps done again: {self.redone}\n"
            f"differences: {len(self.differences)}" + "".join(f"\n  {line}" for line in self.differences)
        )


def survive(run: Run, kills: int, ranks: int, seed: int, patience_s: float = PATIENCE_S) -> Report:
    """Kill one random rank of each job, ``kills`` times, then let the run end. Fills all but the comparison.

    As a scheduler does, the ranks that are left are killed too, a moment later.
    """
    draw = random.Random(seed)
    report, started = Report(ranks), time.monotonic()
    while report.kills < kills:
        newest, unfinished = (run.valid_steps() or [0])[-1], _unfinished(run.checkpoints)
        victim, way = draw.randrange(ranks), ("save", "step", "save", "start", "step")[report.kills % 5]
        death = OwnDeath(victim, draw.randint(1, 22)) if way == "save" else None
        job = run.start(ranks=ranks, death=death)
        if way == "start":
            time.sleep(draw.uniform(0, 0.8))
        elif way == "step":
            step = newest + draw.randint(1, 7)
            job.until(lambda: job.start_step is not None and run.reached(step))  # noqa: B023
            time.sleep(draw.uniform(0, 0.05))
        else:
            job.until(lambda: job.ranks[victim].poll() is not None)  # noqa: B023
        job.ranks[victim].kill()
        code = job.ranks[victim].wait()
        time.sleep(draw.uniform(0, 0.2))
        job.kill()
        if code != -signal.SIGKILL:
            raise RuntimeError(f"rank {victim} ended by itself, after {report.kills} kills:\n{job.output}")
        report.kills += 1
        report.in_start += not any(True for _ in job.batches())
        report.in_save += bool(_unfinished(run.checkpoints) - unfinished)
        if job.start_step not in (None, newest):
            report.differences.append(f"job {len(run.jobs)} went on from step {job.start_step}, not {newest}")
    run.train(ranks=ranks, patience_s=patience_s)
    report.jobs, report.seconds = len(run.jobs), time.monotonic() - started
    return report


def compare(report: Report, run: Run, whole: Run) -> None:
    """Hold a run against one that was left alone: samples, every loss, weights, moments, averages; to the bit."""
    seen, expected = run.history(), whole.history()
    times = sum(seen.values(), Counter())
    report.steps = len(expected)
    report.lost = sum(not samples <= times for samples in expected.values())
    report.repeated = sum(any(times[sample] > 1 for sample in samples) for samples in expected.values())
    report.differences += [f"step {step}: other samples" for step in seen if seen[step] != expected.get(step)]
    given = Counter(step for job in run.jobs for step in {step for step, _ in job.batches()})
    report.redone = given.total() - len(given)

    losses = whole.losses()
    for line in run.metrics():  # steps that were done again too
        if "loss" in line and (line["loss"], line["images"]) != (losses[line["step"]], line["step"] * GLOBAL_BATCH):
            report.differences.append(f"step {line['step']}: loss {line['loss']} after {line['images']} images")
    if len(set(losses.values())) < len(losses):
        report.differences.append("two steps have the same loss: it does not tell batches apart")
    report.differences += [f"step {step}: no loss" for step in losses.keys() - run.losses().keys()]

    ours, theirs = run.state(), whole.state()
    report.differences += [f"{key}: not equal" for key in theirs if not torch.equal(ours[key], theirs[key])]


def write_data(folder: Path, samples: int = 64, size: int = 8) -> Path:
    """Noise images with labels, in small shards."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder, samples_per_shard=24) as writer:
        for number in range(samples):
            file = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file, "png")
            writer.write({"__key__": f"{number:04d}", "png": file.getvalue(), "cls": str(number % 4).encode()})
    return folder


def _unfinished(checkpoints: Path) -> set[tuple[str, int]]:
    """What saves left undone: folders without manifest, temporary files, an old pointer; each with its time."""
    left = [path for path in checkpoints.glob("step-*") if not (path / "manifest.json").exists()]
    left += checkpoints.rglob(".*")
    complete = sorted(path.parent for path in checkpoints.glob("step-*/manifest.json"))
    latest = checkpoints / "latest"
    if complete and (not latest.exists() or latest.read_text().strip() != complete[-1].name):
        left.append(complete[-1])
    return {(str(path), path.stat().st_mtime_ns) for path in left}


def _json_lines(path: Path, tail: int | None = None) -> Iterator[dict[str, Any]]:
    """The complete lines of a file that another process may be writing; with ``tail``, of its last bytes."""
    if not path.exists():
        return
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - tail) if tail else 0)
        text = file.read().decode()
    lines = text.split("\n")[:-1]
    for line in lines[1:] if tail and size > tail else lines:
        if line:
            yield json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a run again and again, and compare it with one left alone.")
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parsed = parser.parse_args()
    print(f"seed {parsed.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="dico-faults-"))
    data = write_data(folder / "data")
    steps = 5 * parsed.kills + 20  # a killed start gets three steps further on average
    overrides = (f"train.duration.steps={steps}", f"train.zero_stage={parsed.zero_stage}")
    whole = Run(folder / "whole", data, "soak", *overrides)
    patience_s = PATIENCE_S + steps
    whole.train(ranks=parsed.ranks, patience_s=patience_s)
    run = Run(folder / "killed", data, "soak", *overrides)
    report = survive(run, parsed.kills, parsed.ranks, parsed.seed, patience_s)
    compare(report, run, whole)
    print(report)
    if report.lost or report.repeated or report.differences:
        sys.exit(f"the runs are in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
