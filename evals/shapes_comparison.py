"""Compares networks on captioned shapes, with the same data, steps and seeds: held-out loss, accuracy, speed.

    python evals/shapes_comparison.py
    python evals/shapes_comparison.py configs/shapes/dico.yaml configs/shapes/mmdit.yaml --seeds 0 1 --out compared.json

Each network and seed is a separate run, runs/NAME-SEED; started again, all of them resume where they stopped. Prompt
accuracy is that of evals/prompt_accuracy.py, on held-out combinations. Means over the seeds are shown and, after the
sign, their standard deviations. The loss of a run is from its last validation, its speed the median of its reports,
and its seconds those of its training, without the time between its starts.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dico_t2i.command import run, script_parser
from dico_t2i.config import load_config
from dico_t2i.models import count_macs, count_parameters
from dico_t2i.report.history import read_history
from dico_t2i.runs.log import json_lines

SHAPES = Path("configs/shapes")
WIDTH = 150
SHOWN = {"val_loss": "held-out loss", "colour": "colour", "background": "background", "shape": "shape"}
SHOWN |= {"place": "place", "all": "all of it", "images_per_s": "images/s", "seconds": "seconds"}


def measure(config: Path, seed: int, runs: Path, prompts: Path, overrides: Sequence[str]) -> dict[str, float]:
    """Train one run, or resume it, sample the held-out prompts, and return its numbers.

    Raises ValueError if one of these commands fails.
    """
    name = f"{load_config(config).name}-{seed}"
    folder = runs / name
    changes = [*overrides, f"name={name}", f"seed={seed}"]
    _python("-m", "dico_t2i", "train", "--config", str(config), "--runs", str(runs), *changes)
    accuracy, samples = folder / "prompt_accuracy.json", folder / "held_out"
    if not accuracy.exists():
        if not (samples / "grid.png").exists():
            command = ("-m", "dico_t2i", "sample", "--checkpoint", str(folder), "--prompts", str(prompts))
            _python(*command, "--out", str(samples), "--batch", "60")
        _python("evals/prompt_accuracy.py", "--images", str(samples), "--out", str(accuracy))
    lines = list(json_lines(folder / "metrics.jsonl"))
    losses, speeds = ([line[key] for line in lines if key in line] for key in ("val_loss", "images_per_s"))
    if not losses or not speeds:
        raise ValueError(f"{folder}: it was never validated, or reported no speed; see validation.every and log.every")
    numbers: dict[str, float] = json.loads(accuracy.read_text())["samples"]
    seconds = read_history(folder).seconds
    return {**numbers, "val_loss": losses[-1], "images_per_s": statistics.median(speeds), "seconds": seconds}


def _python(*command: str) -> None:
    if code := subprocess.run([sys.executable, *command], check=False).returncode:
        raise ValueError(f"python {' '.join(command)}: it ended with exit status {code}")


def summary(config: Path, overrides: Sequence[str], seeds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """A row: the size of the network, and each number of all seeds, with their mean and standard deviation."""
    resolved = load_config(config, overrides)
    model, size = resolved.model, resolved.latent_size
    row: dict[str, Any] = {"config": str(config), "parameters": count_parameters(model)}
    row["macs"] = count_macs(model, (1, model.in_channels, size, size))
    for key in SHOWN:
        values = [seed[key] for seed in seeds]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        row[key] = {"values": values, "mean": statistics.mean(values), "deviation": deviation}
    return row


def print_table(rows: Sequence[dict[str, Any]], seeds: int) -> None:
    table = Table("network", "M parameters", "MMACs", *SHOWN.values(), title=f"shapes, {seeds} seeds")
    for row in rows:
        cells = [Path(row["config"]).stem, f"{row['parameters'] / 1e6:.3f}", f"{row['macs'] / 1e6:.1f}"]
        table.add_row(*cells, *(_shown(key, **row[key]) for key in SHOWN))
    console = Console()
    console.width = max(console.width, WIDTH)  # narrower, names and numbers would be cut
    console.print(table)


def _shown(key: str, values: Sequence[float], mean: float, deviation: float) -> str:
    form = {"val_loss": ".4f", "images_per_s": ".0f", "seconds": ".0f"}.get(key, ".1%")
    return f"{mean:{form}} ± {deviation:{form}}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("configs", nargs="*", type=Path, metavar="CONFIG", help="default: those of configs/shapes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders are (default: runs)")
    parser.add_argument("--prompts", type=int, default=240, help="held-out prompts to sample (default: 240)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a change to all configs")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    args = parser.parse_args(argv)
    configs = args.configs or [path for path in sorted(SHAPES.glob("*.yaml")) if path.stem != "base"]
    for config in configs:
        load_config(config, args.set)
    prompts = args.runs / f"held_out_prompts_{args.prompts}.txt"
    args.runs.mkdir(parents=True, exist_ok=True)
    _python("evals/prompt_accuracy.py", "--write-prompts", str(prompts), "--count", str(args.prompts))
    rows = []
    for config in configs:
        seeds = [measure(config, seed, args.runs, prompts, args.set) for seed in args.seeds]
        rows.append(summary(config, args.set, seeds))
    print_table(rows, len(args.seeds))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
