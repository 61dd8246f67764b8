"""Measures how fast samples are read for training, compared with webdataset's own pipeline on the same shards.

    python evals/reader_speed.py
    python evals/reader_speed.py --pairs 9 --json reader_speed.json

Two data sets are made: JPEGs of 640 x 512 pixels, decoded, cropped and resized to 256, and latents with those of their
mirror images (float16, 2 x 8 x 32 x 32). Both sides choose a caption and a mirror image, and return batches of 128. Our
loader reads in shuffled order, and checks the CRC-32 and that latents are finite; webdataset reads in sequence, which
is the fastest for it, and checks nothing. Each measurement is a separate process; those of the two sides alternate, and
medians are shown. "A core" counts CPU time, workers included, which other programs disturb less than the wall clock.
"""

import io
import json
import multiprocessing
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dico_t2i.command import run, script_parser
from dico_t2i.config import DataConfig
from dico_t2i.data.batches import Wanted
from dico_t2i.data.index import load_index
from dico_t2i.data.loader import Share, make_loader
from dico_t2i.data.order import Order
from dico_t2i.data.reader import ShardReader
from dico_t2i.data.writer import ShardWriter

BATCH, STREAMS, SIZE = 128, 64, 256
CAPTIONS = [f"a photograph of {n} things that stand on a table" for n in ("two", "three", "four", "five", "six")]
LATENTS = {"latent_channels": 4, "latent_size": 32, "image_size": SIZE, "crop": "center", "mirrored": True}

Measured = dict[str, float]


def make_images(root: Path, count: int) -> None:
    """Write JPEGs of waves and grain, of about 100 KB."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:512, 0:640]
    with ShardWriter(root, samples_per_shard=100) as writer:
        for number in range(count):
            periods = rng.uniform(5, 60, 3)
            waves = [127 + 60 * np.sin((x + k * y) / period) for k, period in enumerate(periods)]
            pixels = np.stack(waves, -1) + rng.integers(-24, 24, (512, 640, 3))
            buffer = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
            writer.write({"__key__": f"{number:06d}", "jpg": buffer.getvalue(), "json": {"captions": CAPTIONS}})


def make_latents(root: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    with ShardWriter(root, 1000, "latents", LATENTS) as writer:
        for number in range(count):
            moments = rng.normal(size=(2, 8, 32, 32)).astype(np.float16)
            writer.write({"__key__": f"{number:06d}", "moments.npy": moments, "json": {"captions": CAPTIONS}})


def ours(root: Path, workers: int) -> Iterable[Any]:
    """Endless batches of the loader that training uses."""
    index = load_index(root)
    config = DataConfig(path=str(root), image_size=SIZE, streams=STREAMS, workers=workers)
    return make_loader(
        config,
        index,
        Order(0, index.samples, STREAMS, config.shuffle_block),
        Share(BATCH, BATCH),
        Wanted("text"),
        seed=0,
    )


def theirs(root: Path, workers: int) -> Iterable[Any]:
    """One pass of webdataset's batches, with the same crop and resize by Pillow."""
    import webdataset as wds

    urls = [str(path) for path in sorted(root.glob("*.tar"))]
    stages = wds.WebDataset(urls, shardshuffle=False).decode("pil").map(_finish).batched(BATCH, collation_fn=_collate)
    return wds.WebLoader(stages, batch_size=None, num_workers=workers)


def _finish(sample: dict[str, Any]) -> tuple[torch.Tensor, str]:
    caption = random.choice(sample["json"]["captions"])
    if "moments.npy" in sample:
        return torch.from_numpy(sample["moments.npy"][random.randrange(2)]), caption
    image = sample["jpg"].convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    return pixels.flip(-1) if random.random() < 0.5 else pixels, caption


def _collate(samples: Sequence[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, list[str]]:
    return torch.stack([pixels for pixels, _ in samples]), [caption for _, caption in samples]


def decoder(root: Path, workers: int) -> Iterable[Any]:
    """The JPEG decoder alone, on bytes that were read before; an upper limit for raw images."""
    reader = ShardReader(index := load_index(root))
    for shard, count in enumerate(index.samples.tolist()):
        files = [reader.read(shard, member)["jpg"] for member in range(count)]
        for start in range(0, count, BATCH):
            yield [simplejpeg.decode_jpeg(data) for data in files[start : start + BATCH]]


def measure(source: Callable[[Path, int], Iterable[Any]], root: Path, workers: int, batches: int) -> Measured:
    """Samples per second of wall clock and of CPU time, and growth of memory in MB, measured in a separate process."""
    receive, send = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_measure, args=(source, root, workers, batches, send))
    process.start()
    send.close()
    result: Measured = receive.recv()
    process.join()
    return result


def _measure(source: Callable[[Path, int], Iterable[Any]], root: Path, workers: int, batches: int, send: Any) -> None:
    torch.set_num_threads(1)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    stream = iter(source(root, workers))
    next(stream)
    started, used = time.monotonic(), _cpu_seconds(workers)
    for _ in range(batches):
        next(stream)
    seconds, cpu = time.monotonic() - started, _cpu_seconds(workers) - used
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    samples = batches * BATCH
    send.send({"samples_s": samples / seconds, "samples_cpu_s": samples / cpu, "memory_mb": max(0, grown) / 1e6})
    send.close()
    os._exit(0)  # do not wait for workers that prefetch


def _cpu_seconds(workers: int) -> float:
    """CPU time of this process and its living workers."""
    seconds = time.process_time()
    for child in Path("/proc/self/task").glob("*/children"):
        for number in child.read_text().split() if workers else ():
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
            seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def compare(root: Path, workers: int, batches: int, pairs: int, console: Console) -> dict[str, Measured]:
    """Medians of both sides and of their ratios."""
    sides = {"ours": ours, "webdataset": theirs}
    runs: dict[str, list[Measured]] = {name: [] for name in sides}
    for turn in track(range(pairs), f"{root.name}, {workers} workers", console=console, transient=True):
        for name in list(sides) if turn % 2 else reversed(sides):
            runs[name].append(measure(sides[name], root, workers, batches))
    result = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    both = list(zip(runs["ours"], runs["webdataset"], strict=True))
    result["ratio"] = {
        key: statistics.median(a[key] / b[key] for a, b in both) for key in ("samples_s", "samples_cpu_s")
    }
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--images", type=int, default=640, help="JPEGs to make (default: 640)")
    add("--latents", type=int, default=10_000, help="latents to make (default: 10000)")
    add("--pairs", type=int, default=5, help="measurements of each side (default: 5)")
    add("--out", type=Path, metavar="DIR", help="folder for the data sets (default: a temporary folder)")
    add("--json", type=Path, metavar="FILE", help="JSON file for the numbers")
    arguments = parser.parse_args(argv)
    console, results = Console(), {}
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        for name, make, count in (
            ("images", make_images, arguments.images),
            ("latents", make_latents, arguments.latents),
        ):
            root = Path(folder) / name
            make(root, count)
            size = float(load_index(root).bytes.sum()) / count
            batches = count // BATCH - 1
            for workers in (0, 1):
                found = compare(root, workers, batches, arguments.pairs, console)
                results[f"{name}, {workers} workers"] = {"sample_bytes": {"mean": size}, **found}
            if name == "images":
                alone = [measure(decoder, root, 0, batches) for _ in range(arguments.pairs)]
                results["decoder"] = {"alone": {key: statistics.median(run[key] for run in alone) for key in alone[0]}}
    _show(results, console)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _show(results: dict[str, dict[str, Measured]], console: Console) -> None:
    table = Table("data", "side", "samples/s", "samples/s a core", "MB/s a core", "memory, MB", "ratio (clock, CPU)")
    for name, found in results.items():
        size = found.get("sample_bytes", {}).get("mean", 0.0)
        for side in ("ours", "webdataset", "alone"):
            if side not in found:
                continue
            values, ratio = found[side], found.get("ratio") if side == "ours" else None
            table.add_row(
                name,
                side,
                f"{values['samples_s']:,.0f}",
                f"{values['samples_cpu_s']:,.0f}",
                f"{values['samples_cpu_s'] * size / 1e6:,.0f}" if size else "",
                f"{values['memory_mb']:,.0f}" if "1 workers" not in name else "",
                f"{ratio['samples_s']:.2f}, {ratio['samples_cpu_s']:.2f}" if ratio else "",
            )
    console.print(table)


if __name__ == "__main__":
    sys.exit(run(main))
