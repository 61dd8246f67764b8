"""Measures memory, time and bytes of saving, verifying, loading and exporting checkpoints of a large network.

    python evals/checkpoint_scale.py --config configs/dico_h_t2i.yaml --out /scratch/checkpoint_scale

No network is built, so that a checkpoint can be larger than the memory: the ranks take turns, and what a rank would
hold are views of a small pool of random numbers. All else is what training does: each rank has an equal range of all
parameters, as with ZeRO stage 1 or 2, and saves it with ``checkpoint.background: false``. What is loaded is compared
with the pool, bit by bit, and this comparison is not part of the times.

Each turn is a process of its own. Its peak memory is the highest resident set, mapped files included, minus that at its
start; the system's cache of files is not part of it. Nor does that cache help, since it is emptied of the checkpoint
before each turn. Seconds are also given for a GB, and relative to those of plain dd for the same bytes: writing random
ones to the same disk with conv=fsync, or reading them.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dico_t2i.command import positive, run, script_parser
from dico_t2i.config import Config, load_config
from dico_t2i.export.folder import export
from dico_t2i.models import build_network
from dico_t2i.runs import checkpoint as ckpt
from dico_t2i.runs.folder import RunFolder
from dico_t2i.runs.kinds import MOMENTS, WEIGHT, ema_name
from dico_t2i.runs.weights import default_weights
from dico_t2i.training.checkpoint_writer import CheckpointWriter
from dico_t2i.training.retention import Retention

GB = 10**9
_SHIFTS = 1 << 16  # by which the views of different parameters differ


@dataclass(frozen=True)
class Turn:
    """What one process did. bytes: of the files, or of the parts of them, that it had to write or read."""

    name: str
    bytes: int
    share: int  # bytes of the model state that the rank holds; 0 for work on whole files
    seconds: float
    peak: int
    read: int
    plain_s: float  # the seconds of dd for the same bytes


class State:
    """The parameters of a network, and numbers for them. ``held`` is where loaded pieces are put."""

    def __init__(self, config: Config) -> None:
        with torch.device("meta"):
            network = build_network(config.model)
        self.shapes = {name: p.shape for name, p in network.named_parameters()}
        self.kinds = (WEIGHT, *MOMENTS, *map(ema_name, config.optimizer.ema))
        self.numel = sum(shape.numel() for shape in self.shapes.values())
        largest = max(shape.numel() for shape in self.shapes.values())
        self.pool = torch.randn(largest + _SHIFTS, generator=torch.Generator().manual_seed(0))
        self.held = {kind: torch.zeros(largest) for kind in self.kinds}

    @property
    def bytes(self) -> int:
        return 4 * self.numel * len(self.kinds)

    def numbers(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """The elements of a parameter from ``start`` to ``stop``."""
        shift = zlib.crc32(f"{kind}:{name}".encode()) % _SHIFTS
        return self.pool[shift + start : shift + stop]

    def ranges(self, rank: int, ranks: int) -> Iterator[tuple[str, int, int]]:
        """The parameters of a rank, with the start and the stop of the range that it holds of each."""
        share = -(-self.numel // ranks)
        begin, end, at = rank * share, (rank + 1) * share, 0
        for name, shape in self.shapes.items():
            start, stop = max(begin - at, 0), min(end - at, shape.numel())
            if start < stop:
                yield name, start, stop
            at += shape.numel()

    def pieces(self, rank: int, ranks: int) -> Iterator[ckpt.Piece]:
        """What a rank saves."""
        for name, start, stop in self.ranges(rank, ranks):
            yield ckpt.Piece(name, start, {kind: self.numbers(kind, name, start, stop) for kind in self.kinds})

    def targets(self, rank: int, ranks: int, idle: list[float]) -> Iterator[ckpt.Piece]:
        """What a rank loads, one piece after the other at the same place; each is compared after it was filled.

        The seconds of comparing are added to ``idle``.
        """
        for name, start, stop in self.ranges(rank, ranks):
            piece = ckpt.Piece(name, start, {kind: self.held[kind][: stop - start] for kind in self.kinds})
            yield piece
            began = time.perf_counter()
            for kind, tensor in piece.tensors.items():
                if not torch.equal(tensor, self.numbers(kind, name, start, stop)):
                    raise ValueError(f"{kind} of {name} from {start} on is not what was saved")
            idle.append(time.perf_counter() - began)


class Bench:
    """A run folder with one checkpoint, and the turns on it."""

    def __init__(self, config: Config, folder: Path, plain_bytes: int) -> None:
        self.config, self.state = config, State(config)
        self.run = RunFolder(folder, "run")
        self.run.write_config(config)
        self.plain = Plain(folder, plain_bytes)
        self.turns: list[Turn] = []

    def save(self, rank: int, ranks: int) -> None:
        def work(idle: list[float]) -> None:
            writer = CheckpointWriter(self.run.checkpoints, rank, ranks, Retention(1), background=False)
            state = {"position": 0, "optimizer_steps": 1, "loss": 0.0}
            writer.save(1, self.state.pieces(rank, ranks), self.state.shapes, state)
            if writer.error:
                raise writer.error

        share = self._share(rank, ranks)
        self._turn(f"save, rank {rank} of {ranks}", share, share, self.plain.write_s, work)

    def verify(self) -> None:
        total = self.state.bytes
        self._turn("verify", total, 0, self.plain.read_s, lambda idle: ckpt.verify(self._checkpoint()))

    def load(self, rank: int, ranks: int) -> None:
        def work(idle: list[float]) -> None:
            ckpt.fill(self._checkpoint(), self.state.targets(rank, ranks, idle))

        share = self._share(rank, ranks)
        self._turn(f"load, rank {rank} of {ranks}", share, share, self.plain.read_s, work)

    def export(self) -> None:
        out, kind = self.run.path.with_name("exported"), default_weights(self.config)
        per_byte = self.plain.write_s + self.plain.read_s
        work = lambda idle: export(self.run.path, kind, out, encoders=False)  # noqa: E731
        self._turn("export", 4 * self.state.numel, 0, per_byte, work)
        shutil.rmtree(out)

    def _checkpoint(self) -> ckpt.Checkpoint:
        return ckpt.newest_checkpoint(self.run.checkpoints)

    def _share(self, rank: int, ranks: int) -> int:
        return 4 * len(self.state.kinds) * sum(stop - start for _, start, stop in self.state.ranges(rank, ranks))

    def _turn(self, name: str, size: int, share: int, plain_s: float, work: Callable[[list[float]], None]) -> None:
        for file in self.run.checkpoints.rglob("*.safetensors"):
            forget(file)
        seconds, peak, read = in_turn(work)
        self.turns.append(Turn(name, size, share, seconds, peak, read, plain_s * size))
        print(f"{name}: {seconds:.1f} s, {read / GB:.3f} GB read, peak {peak / 1e6:.0f} MB", flush=True)


class Plain:
    """What dd needs on the same disk: seconds for a byte written, and for a byte read."""

    def __init__(self, folder: Path, size: int) -> None:
        source, target = folder / "random", folder / "plain"
        with source.open("wb") as file:
            for _ in range(size >> 20):
                file.write(os.urandom(1 << 20))
        size = source.stat().st_size
        self.write_s = self._dd(f"if={source}", f"of={target}", "conv=fsync") / size
        forget(target)
        self.read_s = self._dd(f"if={target}", "of=/dev/null") / size
        source.unlink()
        target.unlink()

    def _dd(self, *arguments: str) -> float:
        began = time.perf_counter()
        subprocess.run(["dd", "bs=16M", *arguments], check=True, capture_output=True)
        return time.perf_counter() - began


def forget(file: Path) -> None:
    """Remove a file from the system's cache."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def in_turn(work: Callable[[list[float]], None]) -> tuple[float, int, int]:
    """Do work in a process of its own, and return its seconds, peak memory and bytes read.

    work(idle) adds seconds that do not count to ``idle``. Raises RuntimeError if it fails.
    """
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_measure, args=(work, there))
    process.start()
    there.close()
    try:
        measured: tuple[float, int, int] = here.recv()
    except EOFError:
        raise RuntimeError("the process of this turn failed; its error is printed above") from None
    process.join()
    return measured


def _measure(work: Callable[[list[float]], None], answer: Connection) -> None:
    idle: list[float] = []
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, read, began = _status("VmRSS"), _bytes_read(), time.perf_counter()
    work(idle)
    seconds = time.perf_counter() - began - sum(idle)
    answer.send((seconds, _status("VmHWM") - before, _bytes_read() - read))


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar: from the disk or from the cache


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a new folder on the disk to measure; it is deleted")
    parser.add_argument("--save-ranks", type=positive, default=2, help="ranks that save (default: 2)")
    parser.add_argument("--load-ranks", type=positive, nargs="+", default=[4, 1], help="ranks that load (default: 4 1)")
    parser.add_argument("--plain-mb", type=positive, default=2048, help="MB for dd to write and read (default: 2048)")
    parser.add_argument("--json", type=Path, help="JSON file for the numbers")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.error(f"--out {args.out}: it exists already; give a new folder")
    torch.set_num_threads(1)  # a process with other threads must not fork
    args.out.mkdir(parents=True)
    try:
        _measure_all(args, load_config(args.config, args.overrides))
    finally:
        shutil.rmtree(args.out)
    return 0


def _measure_all(args: argparse.Namespace, config: Config) -> None:
    bench = Bench(config, args.out, args.plain_mb << 20)
    CheckpointWriter(bench.run.checkpoints, 0, 1, Retention(1)).prepare(1)
    for rank in reversed(range(args.save_ranks)):  # rank 0 waits for the others
        bench.save(rank, args.save_ranks)
    bench.verify()
    for ranks in args.load_ranks:
        for rank in range(ranks):
            bench.load(rank, ranks)
    bench.export()
    _report(bench)
    if args.json:
        args.json.write_text(json.dumps([asdict(turn) for turn in bench.turns], indent=1) + "\n")


def _report(bench: Bench) -> None:
    state = bench.state
    what = (
        f"{bench.config.name}: {state.numel / 1e6:.1f}M parameters, {len(state.kinds)} kinds, {state.bytes / GB:.2f} GB"
    )
    table = Table("turn", "GB", "s", "s/GB", "x dd", "GB read", "peak, MB", "of the share", title=what)
    for turn in bench.turns:
        table.add_row(*_row(turn))
    Console(width=120).print(table)
    print(f"dd: {GB * bench.plain.write_s:.2f} s/GB written, {GB * bench.plain.read_s:.2f} s/GB read")


def _row(turn: Turn) -> Iterator[str]:
    yield turn.name
    yield f"{turn.bytes / GB:.2f}"
    yield f"{turn.seconds:.1f}"
    yield f"{turn.seconds / turn.bytes * GB:.2f}"
    yield f"{turn.seconds / turn.plain_s:.1f}"
    yield f"{turn.read / GB:.2f}"
    yield f"{turn.peak / 1e6:.0f}"
    yield f"{100 * turn.peak / turn.share:.1f} %" if turn.share else ""


if __name__ == "__main__":
    sys.exit(run(main))
