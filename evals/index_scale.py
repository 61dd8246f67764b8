"""Measures how a rank opens a data set of up to 1e9 samples, finds its place in the order, and reads on from there.

    python evals/index_scale.py
    python evals/index_scale.py --samples 1e6 1e9 --ranks 8 --json index_scale.json

The data sets are made: 10,000 latents of 17 KB in each shard, whose bytes are all zero. The tars and most of the shard
indexes are sparse files, so that 1e9 samples need about 0.5 GB of disk. Each rank is one of 1,024 with a stream of its
own and a global batch of 2,048. It goes through the start of training: it opens the index (the first rank also compares
the sizes of all shards, and opens the index a second time for that), makes the order and the samples of the first step,
jumps to a step in the third epoch, and reads its next 1,000 samples with all checks. Each measurement is one process
alone, and then several at the same time; of these the slowest is shown, and the largest memory. "Private" is what the
process has in addition, "shared" is mapped from files, which all processes of the machine share. "Peak" counts both,
and what was only needed for a moment.
"""

import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dico_t2i.command import positive, run, script_parser
from dico_t2i.config import DataConfig
from dico_t2i.data.index import write_index
from dico_t2i.data.order import rank_positions
from dico_t2i.data.reader import ShardReader
from dico_t2i.data.shard import ShardIndex, index_path
from dico_t2i.data.sources import load_data, make_order

PER_SHARD = 10_000
WORLD = STREAMS = 1024
BATCH = 2048
READ = 1000  # samples of a rank after the jump
EPOCHS = 2.5  # before the jump

_MEMBERS = {"json": 300, "moments.npy": 16_512}  # bytes
_SAMPLE = 18_432  # bytes of a sample in the tar: its members, their headers, and what fills blocks of 512
_META = {"latent_channels": 4, "latent_size": 32, "image_size": 256, "crop": "center"}

Measured = dict[str, float]


def make(root: Path, samples: int, ranks: int) -> Measured:
    """Write a data set, and return the seconds that ``write_index`` needed for its shards, whose own indexes exist."""
    root.mkdir()
    blank = _blank()
    for tar in (root / f"shard-{number:06d}.tar" for number in range(samples // PER_SHARD)):
        _sparse(tar, b"", PER_SHARD * _SAMPLE)
        _sparse(index_path(tar), *blank)
    started, used = time.monotonic(), time.process_time()
    index = write_index(root, "latents", _META, check=False)
    result = {"seconds": time.monotonic() - started, "cpu_s": time.process_time() - used}
    order, full = make_order(_config(root), index, 0, BATCH), _full()
    for rank in range(ranks):
        shards, _ = order.locate(np.concatenate([_positions(s, rank) for s in _steps(order.epoch_length)]))
        for shard in np.unique(shards).tolist():
            full.save(index_path(index.path(shard)))
    return result


def _config(root: Path) -> DataConfig:
    return DataConfig(path=str(root), streams=STREAMS)


def _positions(step: int, rank: int) -> np.ndarray:
    return rank_positions(step, BATCH, STREAMS, rank, WORLD)


def _steps(epoch_length: int) -> range:
    """The steps after the jump that have the samples to read."""
    first = int(EPOCHS * epoch_length) // BATCH
    return range(first, first + READ * WORLD // BATCH)


def _full() -> ShardIndex:
    """The index of a shard of zeros."""
    starts = 512 + _SAMPLE * np.arange(PER_SHARD)[:, None]
    offsets = starts + np.array([0, 1024], np.int64)
    sizes = np.broadcast_to(np.array(list(_MEMBERS.values())), offsets.shape)
    keys = "".join(f"{number:08d}" for number in range(PER_SHARD)).encode()
    return ShardIndex(
        extensions=tuple(_MEMBERS),
        offsets=offsets,
        sizes=np.ascontiguousarray(sizes),
        crc32=np.ascontiguousarray(np.broadcast_to(_checksums(), offsets.shape)),
        key_bytes=np.frombuffer(keys, np.uint8),
        key_bounds=np.arange(0, len(keys) + 1, 8),
        tar_bytes=PER_SHARD * _SAMPLE,
    )


def _checksums() -> np.ndarray:
    from zlib import crc32

    return np.array([crc32(bytes(size)) for size in _MEMBERS.values()])


def _blank() -> tuple[bytes, int]:
    """The beginning and the length of a shard index of the same size in which all else is zero."""
    zeros = np.zeros((PER_SHARD, len(_MEMBERS)), np.int64)
    bounds = np.zeros(PER_SHARD + 1, np.int64)
    tar_bytes = PER_SHARD * _SAMPLE
    blank = ShardIndex(tuple(_MEMBERS), zeros, zeros, zeros, np.empty(0, np.uint8), bounds, tar_bytes)
    with tempfile.TemporaryDirectory() as folder:
        blank.save(path := Path(folder) / "index")
        content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")], len(content)


def _sparse(path: Path, beginning: bytes, size: int) -> None:
    with path.open("wb") as file:
        file.write(beginning)
        file.truncate(size)


def rank_start(root: Path, rank: int) -> dict[str, Measured]:
    """Go through the start of a rank. Returns seconds and MB of each phase."""
    found: dict[str, Measured] = {}
    config = _config(root)
    index = _measured(found, "open", lambda: load_data(config, check=False))
    if rank == 0:
        _measured(found, "open, sizes", lambda: load_data(config))
    order = make_order(config, index, 0, BATCH)
    _measured(found, "order", lambda: order.locate(_positions(0, rank)))
    steps = _steps(order.epoch_length)
    _measured(found, "seek", lambda: order.locate(_positions(steps[0], rank)))
    reader = ShardReader(index, open_shards=4 * STREAMS // WORLD)

    def read() -> int:
        count = 0
        for step in steps:
            shards, members = (places.tolist() for places in order.locate(_positions(step, rank)))
            count += sum(bool(reader.read(*place)) for place in zip(shards, members, strict=True))
        return count

    assert _measured(found, "read", read) == READ
    return found


def _measured(found: dict[str, Measured], phase: str, work: Callable[[], Any]) -> Any:
    """The result of ``work``; its seconds and the growth of memory in MB go to ``found``."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before, started, used = _memory(), time.monotonic(), time.process_time()
    result = work()
    seconds, cpu = time.monotonic() - started, time.process_time() - used
    growth = {name: value - before[name] for name, value in _memory().items()}
    growth["peak_mb"] += before["peak_mb"] - before["rss_mb"]
    found[phase] = {"seconds": seconds, "cpu_s": cpu, **growth}
    return result


def _memory() -> Measured:
    """The memory of this process in MB."""
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    sizes = {line[0]: int(line[1]) * 1024 / 1e6 for line in lines}
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    own, every = sizes["Anonymous:"], sizes["Rss:"]
    return {"private_mb": own, "shared_mb": every - own, "rss_mb": every, "peak_mb": peak}


def measure(root: Path, ranks: int) -> list[dict[str, Measured]]:
    """The starts of several ranks at the same time, each in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    barrier, pipes, processes = spawn.Barrier(ranks), [], []
    for rank in range(ranks):
        receive, send = spawn.Pipe(duplex=False)
        process = spawn.Process(target=_rank, args=(root, rank, barrier, send))
        process.start()
        send.close()
        pipes.append(receive)
        processes.append(process)
    results = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return results


def _rank(root: Path, rank: int, barrier: Any, send: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    barrier.wait()
    found = rank_start(root, rank)
    found["process"] = _memory()
    barrier.wait()  # what is shared is still shared
    send.send(found)


def worst(starts: Sequence[dict[str, Measured]]) -> dict[str, Measured]:
    """The largest of each number over the ranks."""
    return {
        phase: {name: max(start[phase][name] for start in starts if phase in start) for name in values}
        for phase, values in starts[0].items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    sizes = [10.0**power for power in (6, 7, 8, 9)]
    add("--samples", type=float, nargs="+", default=sizes, metavar="N", help="samples (default: 1e6 1e7 1e8 1e9)")
    add("--ranks", type=positive, default=8, help="processes at the same time (default: 8)")
    add("--out", type=Path, metavar="DIR", help="folder for the data sets (default: a temporary folder)")
    add("--json", type=Path, metavar="FILE", help="JSON file for the numbers")
    arguments = parser.parse_args(argv)
    console, results = Console(), dict[int, dict[str, dict[str, Measured]]]()
    for samples in map(int, arguments.samples):
        with tempfile.TemporaryDirectory(dir=arguments.out) as folder, console.status(f"{samples:,} samples"):
            root = Path(folder) / "data"
            results[samples] = {"all shards": {"write index": make(root, samples, arguments.ranks)}}
            for ranks in sorted({1, arguments.ranks}):
                results[samples][f"{ranks} rank{'s' * (ranks > 1)}"] = worst(measure(root, ranks))
        _show(samples, results[samples], console)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _show(samples: int, found: dict[str, dict[str, Measured]], console: Console) -> None:
    table = Table("", "phase", "seconds", "CPU s", "private MB", "shared MB", "peak MB", title=f"{samples:,} samples")
    digits = {"seconds": 3, "cpu_s": 3, "private_mb": 1, "shared_mb": 1, "peak_mb": 1}
    for who, phases in found.items():
        for phase, values in phases.items():
            numbers = (f"{values[name]:.{places}f}" if name in values else "" for name, places in digits.items())
            table.add_row(who, phase, *numbers)
    console.print(table)


if __name__ == "__main__":
    sys.exit(run(main))
