"""Measures what saving and loading checkpoints costs on this machine, and how long each save delays training.

    python evals/checkpoint_cost.py --config configs/dico_b_imagenet256.yaml --out /scratch/checkpoint_cost
    torchrun --nproc-per-node 8 evals/checkpoint_cost.py --config configs/dico_h_t2i.yaml --out /scratch/checkpoint_cost

It trains on random latents, so that no data or encoder is needed, and saves in turn with ``checkpoint.background``
false and true. A background save costs the copy to host memory, and slows down the steps during which it is written;
both are counted.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from dico_t2i.command import run, script_parser
from dico_t2i.config import Config, load_config
from dico_t2i.models import build_network
from dico_t2i.runs import checkpoint as ckpt
from dico_t2i.training.checkpoint_writer import CheckpointWriter
from dico_t2i.training.engine import Engine
from dico_t2i.training.ranks.distributed import World, join_world, leave_world
from dico_t2i.training.retention import Retention


class Trial:
    """One rank's engine, which is trained on random latents."""

    def __init__(self, config: Config, world: World, batch: int, folder: Path) -> None:
        self.world, self.folder = world, folder
        network = build_network(config.model)
        self.engine = Engine(network, config.train, config.optimizer, (batch, 1), world, config.cluster)
        self.engine.materialize(0)
        model, device = config.model, world.device
        self.x = torch.randn(batch, model.in_channels, config.latent_size, config.latent_size, device=device)
        self.t = torch.randint(config.diffusion.steps, (batch,), device=device)
        self.cond: dict[str, Any] = {"cond": torch.zeros(batch, dtype=torch.int64, device=device)}
        if model.condition == "text":
            self.cond = {"cond": torch.randn(batch, model.text_tokens, model.text_dim, device=device)}
        if model.pooled_text:
            self.cond["pooled"] = torch.randn(batch, model.pooled_dim, device=device)
        self.saved = 0

    def step(self) -> float:
        """Make one training step, and return its seconds."""
        return self._timed(self._step)

    def save(self, background: bool) -> CheckpointWriter:
        """Start a save, as the trainer does; the duration of this call is its pause."""
        self.saved += 1
        writer = CheckpointWriter(self.folder, self.world.rank, self.world.size, Retention(1), background)
        if self.world.is_main:
            writer.prepare(self.saved)
        dist.barrier()
        state = {"position": 0, "optimizer_steps": self.engine.optimizer_steps, "loss": 0.0}
        writer.save(self.saved, self.engine.owned_pieces(), self.engine.shapes, state)
        return writer

    def load(self) -> float:
        """Read the newest checkpoint, compare its checksums, and return the seconds."""
        return self._timed(self._load)

    def _step(self) -> None:
        self.engine.backward(self.engine.model(self.x, self.t, **self.cond).float().square().mean())
        self.engine.step(1e-5)

    def _load(self) -> None:
        checkpoint = ckpt.newest_checkpoint(self.folder)
        ckpt.fill(checkpoint, self.engine.pieces())
        self.engine.publish_weights()

    def _timed(self, work: Callable[[], None]) -> float:
        started = time.perf_counter()
        work()
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def measure(trial: Trial, background: bool, plain_step: float) -> dict[str, float]:
    """The pause, the seconds until the checkpoint is on disk, and the total seconds that training lost by one save."""
    started = time.perf_counter()
    writer = trial.save(background)
    pause = time.perf_counter() - started
    slower = 0.0
    while _busy(writer, trial.world):
        slower += trial.step() - plain_step
    written = time.perf_counter() - started
    writer.wait()
    if writer.error:
        raise writer.error
    return {"pause_s": pause, "written_s": written, "lost_s": pause + max(0.0, slower)}


def _busy(writer: CheckpointWriter, world: World) -> bool:
    busy = torch.tensor(float(writer.busy), device=world.device)
    dist.all_reduce(busy)
    return bool(busy)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="a new folder on the disk to measure; it is deleted afterwards"
    )
    parser.add_argument("--batch", type=int, default=4, help="samples per rank and step (default: 4)")
    parser.add_argument("--repeats", type=int, default=3, help="saves of each kind (default: 3)")
    parser.add_argument("--json", type=Path, help="JSON file for the numbers")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.error(f"--out {args.out}: it exists already; give a new folder")
    config, world = load_config(args.config, args.overrides), join_world()
    trial = Trial(config, world, args.batch, args.out)
    steps = [trial.step() for _ in range(4)]
    plain_step = statistics.median(steps[1:])
    results: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for _ in range(args.repeats):
        for background in (False, True):
            results[background].append(measure(trial, background, plain_step))
    loads = [trial.load() for _ in range(args.repeats)]
    dist.barrier()
    if world.is_main:
        _report(args, config, plain_step, results, loads)
        shutil.rmtree(args.out)
    leave_world()
    return 0


def _report(
    args: argparse.Namespace,
    config: Config,
    plain_step: float,
    results: dict[bool, list[dict[str, float]]],
    loads: list[float],
) -> None:
    size = sum(file.stat().st_size for file in args.out.rglob("*.safetensors"))
    names = {False: "synchronous", True: "in the background"}
    table = Table(
        "save", "pause, s", "until on disk, s", "training lost, s", title=f"{config.name}: {size / 1e9:.2f} GB a save"
    )
    numbers: dict[str, Any] = {"bytes": size, "step_s": plain_step, "load_s": statistics.median(loads)}
    for background, runs in results.items():
        numbers[names[background]] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        table.add_row(names[background], *(_spread([run[key] for run in runs]) for key in runs[0]))
    Console().print(table)
    print(f"one step {plain_step:.2f} s; verifying and loading {_spread(loads)} s")
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(run(main))
