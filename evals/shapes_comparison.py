"""Compares networks on captioned shapes, at equal steps or at equal CPU time: held-out loss, accuracy, speed.

    python evals/shapes_comparison.py
    python evals/shapes_comparison.py --equal steps time
    python evals/shapes_comparison.py configs/shapes/dico.yaml configs/shapes/mmdit.yaml --seeds 0 1 --out compared.json

Each network and seed is a separate run, runs/NAME-SEED; started again, all of them resume where they stopped. At equal
time, in runs/NAME-SEED-time, each network takes as many steps as fit into the time that the first one needs for its
own. CPU seconds per step are measured for this, in turns on one thread, and kept in runs/step_seconds.json.

Accuracy is measured on two sets of prompts for combinations that are never trained: one object, as in
evals/prompt_accuracy.py, and two objects, as in evals/shapes/pairs.py. Means over the seeds are shown with 95 %
confidence intervals (Student's t). The loss of a run, and its bands of timesteps, are from the last validation; "ratio"
is the loss divided by that of the first network with the same seed, lowest and highest. The speed of a run is the
median of its reports, and its seconds are those of its training, without the time between its starts.
"""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from data_prep.shapes_scene import held_out_pairs, held_out_prompts
from dico_t2i.command import run, script_parser
from dico_t2i.config import Config, load_config
from dico_t2i.models import count_macs, count_parameters
from dico_t2i.report.history import read_history
from dico_t2i.runs.log import json_lines
from evals.prompt_accuracy import PROPERTIES, accuracy
from evals.shapes.cost import step_seconds
from evals.shapes.pairs import PAIR_MEASURES, pair_accuracy
from evals.shapes.programs import python, samples

SHAPES = Path("configs/shapes")
WIDTH = 190
ROUNDS = 15
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # as the steps are timed
SHOWN = ("val_loss", *PROPERTIES, "all", *PAIR_MEASURES, "images_per_s", "seconds")


def equal_time(configs: Sequence[Config], seconds: Sequence[float]) -> list[list[str]]:
    """The changes with which each config takes as long as the first one does.

    seconds: of one step of each config. Raises ValueError for a config with stages or without a number of steps.
    """
    for config in configs:
        if config.stages or not config.train.duration.steps:
            raise ValueError(f"--equal time: {config.name} has stages, or no train.duration.steps; use --equal steps")
    budget = (configs[0].train.duration.steps or 0) * seconds[0]
    changes = []
    for config, each in zip(configs, seconds, strict=True):
        steps = round(budget / each)
        own = steps == config.train.duration.steps
        changes.append([] if own else [f"train.duration.steps={steps}", f"validation.every.steps={steps}"])
    return changes


def measure(file: Path, run: Path, seed: int, overrides: Sequence[str], prompts: int) -> dict[str, float]:
    """Train one run, or resume it, sample the held-out prompts, and return its numbers.

    Raises ValueError if one of these commands fails.
    """
    changes = [*overrides, f"name={run.name}", f"seed={seed}"]
    python("-m", "dico_t2i", "train", "--config", str(file), "--runs", str(run.parent), *changes, **ONE_THREAD)
    ones, twos = held_out_prompts(prompts, seed=0), held_out_pairs(prompts, seed=0)
    numbers = accuracy(samples(run / "one_object", str(run), ones, **ONE_THREAD), [scene for _, scene in ones])
    numbers |= pair_accuracy(samples(run / "two_objects", str(run), twos, **ONE_THREAD), [scene for _, scene in twos])
    lines = list(json_lines(run / "metrics.jsonl"))
    validations, speeds = [line for line in lines if "val_loss" in line], [line.get("images_per_s") for line in lines]
    if not validations or not any(speeds):
        raise ValueError(f"{run}: it was never validated, or reported no speed; see validation.every and log.every")
    numbers |= {key: value for key, value in validations[-1].items() if key.startswith("val_loss")}
    speed = statistics.median(speed for speed in speeds if speed)
    return {**numbers, "images_per_s": speed, "seconds": read_history(run).seconds}


def summary(file: Path, overrides: Sequence[str], seeds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """A row: the size of the network, and each number of all seeds, with its mean and interval."""
    config = load_config(file, overrides)
    steps = sum(stage.train.duration.steps or 0 for stage in config.stage_configs)
    row: dict[str, Any] = {"config": str(file), "overrides": list(overrides), "steps": steps}
    row["parameters"] = count_parameters(config.model)
    row["macs"] = count_macs(config.model, (1, config.model.in_channels, config.latent_size, config.latent_size))
    for key in seeds[0]:
        values = [seed[key] for seed in seeds]
        row[key] = {"values": values, "mean": statistics.mean(values), "interval": interval(values)}
    return row


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean; 0 for a single value, which has none."""
    if len(values) < 2:
        return 0.0
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return float(quantile * statistics.stdev(values) / math.sqrt(len(values)))


def print_tables(rows: Sequence[dict[str, Any]], title: str) -> None:
    """One table of accuracies, and one of the losses in each band of timesteps."""
    bands = [key for key in rows[0] if key.startswith("val_loss_t")]
    accuracies = Table("network", "M parameters", "MMACs", "steps", *SHOWN, "ratio", title=title)
    losses = Table("network", "val_loss", *(band.removeprefix("val_loss_") for band in bands), title="loss by timestep")
    for row in rows:
        name = Path(row["config"]).stem
        sizes = f"{row['parameters'] / 1e6:.3f}", f"{row['macs'] / 1e6:.1f}", str(row["steps"])
        ratios = [a / b for a, b in zip(row["val_loss"]["values"], rows[0]["val_loss"]["values"], strict=True)]
        ends = f"{min(ratios):.2f} to {max(ratios):.2f}"
        accuracies.add_row(name, *sizes, *(_shown(key, row[key]) for key in SHOWN), ends)
        losses.add_row(name, *(_shown(key, row[key]) for key in ("val_loss", *bands)))
    console = Console()
    console.width = max(console.width, WIDTH)  # narrower, names and numbers would be cut
    console.print(accuracies, losses)


def _shown(key: str, number: dict[str, Any]) -> str:
    form = ".4f" if key.startswith("val_loss") else ".0f" if key in ("images_per_s", "seconds") else ".0%"
    return f"{number['mean']:{form}} ± {number['interval']:{form}}"


def _step_seconds(names: Sequence[str], configs: Sequence[Config], kept: Path) -> list[float]:
    """CPU seconds of a step of each config: those that are kept in a file, if it has all, so that runs can resume."""
    found: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    if not set(names) <= found.keys():
        found = dict(zip(names, step_seconds(configs, ROUNDS), strict=True))
        kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return [found[name] for name in names]


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("configs", nargs="*", type=Path, metavar="CONFIG", help="default: those of configs/shapes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    kinds = ("steps", "time")
    parser.add_argument(
        "--equal", nargs="+", choices=kinds, default=["steps"], help="one table for each (default: steps)"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders are (default: runs)")
    parser.add_argument("--prompts", type=int, default=240, help="prompts of each kind, an even number (default: 240)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a change to all configs")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    args = parser.parse_args(argv)
    if args.prompts < 2 or args.prompts % 2:
        raise ValueError(f"--prompts {args.prompts}: it must be even, since prompts of two objects come in pairs")
    files = args.configs or [path for path in sorted(SHAPES.glob("*.yaml")) if path.stem != "base"]
    configs = [load_config(file, args.set) for file in files]
    args.runs.mkdir(parents=True, exist_ok=True)
    changes: dict[str, list[list[str]]] = {"steps": [[] for _ in configs]}
    if "time" in args.equal:
        names = [" ".join([str(file), *args.set]) for file in files]
        changes["time"] = equal_time(configs, _step_seconds(names, configs, args.runs / "step_seconds.json"))
    tables: dict[str, list[dict[str, Any]]] = {}
    for equal in args.equal:
        tables[equal] = []
        for file, config, more in zip(files, configs, changes[equal], strict=True):
            runs = [args.runs / f"{config.name}-{seed}{'-time' if more else ''}" for seed in args.seeds]
            overrides = [*args.set, *more]
            numbers = [measure(file, r, s, overrides, args.prompts) for r, s in zip(runs, args.seeds, strict=True)]
            tables[equal].append(summary(file, overrides, numbers))
        print_tables(tables[equal], f"shapes, {len(args.seeds)} seeds, equal {equal}")
    if args.out:
        args.out.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
