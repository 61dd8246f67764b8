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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from data_prep.shapes_scene import held_out_pairs, held_out_prompts
from dico_t2i.command import run, script_parser
from dico_t2i.config import load_config
from evals.comparison.equal import EQUAL, ONE_THREAD, equal_changes, run_name
from evals.comparison.programs import python
from evals.comparison.summary import Row, ratios, shown, sizes, summary, training_numbers
from evals.prompt_accuracy import PROPERTIES, accuracy
from evals.shapes.pairs import PAIR_MEASURES, pair_accuracy
from evals.shapes.programs import samples

SHAPES = Path("configs/shapes")
WIDTH = 190
SHOWN = ("val_loss", *PROPERTIES, "all", *PAIR_MEASURES, "images_per_s", "seconds")


def measure(file: Path, run: Path, seed: int, overrides: Sequence[str], prompts: int) -> dict[str, float]:
    """Train one run, or resume it, sample the held-out prompts, and return its numbers.

    Raises ValueError if one of these commands fails.
    """
    changes = [*overrides, f"name={run.name}", f"seed={seed}"]
    python(
        "-m", "dico_t2i", "train", "--config", str(file), "--runs", str(run.parent), *changes, environment=ONE_THREAD
    )
    ones, twos = held_out_prompts(prompts, seed=0), held_out_pairs(prompts, seed=0)
    numbers = accuracy(
        samples(run / "one_object", str(run), ones, environment=ONE_THREAD), [scene for _, scene in ones]
    )
    numbers |= pair_accuracy(
        samples(run / "two_objects", str(run), twos, environment=ONE_THREAD), [scene for _, scene in twos]
    )
    return numbers | training_numbers(run)


def print_tables(rows: Sequence[Row], title: str) -> None:
    """One table of accuracies, and one of the losses in each band of timesteps."""
    bands = [key for key in rows[0] if key.startswith("val_loss_t")]
    accuracies = Table("network", "M parameters", "MMACs", "steps", *SHOWN, "ratio", title=title)
    losses = Table("network", "val_loss", *(band.removeprefix("val_loss_") for band in bands), title="loss by timestep")
    for row in rows:
        found = ratios(row, rows[0], "val_loss")
        ends = f"{min(found):.2f} to {max(found):.2f}"
        accuracies.add_row(*sizes(row), *(_shown(key, row[key]) for key in SHOWN), ends)
        losses.add_row(sizes(row)[0], *(_shown(key, row[key]) for key in ("val_loss", *bands)))
    console = Console()
    console.width = max(console.width, WIDTH)  # narrower, names and numbers would be cut
    console.print(accuracies, losses)


def _shown(key: str, number: dict[str, Any]) -> str:
    return shown(
        number, ".4f" if key.startswith("val_loss") else ".0f" if key in ("images_per_s", "seconds") else ".0%"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("configs", nargs="*", type=Path, metavar="CONFIG", help="default: those of configs/shapes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--equal", nargs="+", choices=EQUAL, default=["steps"], help="one table for each (default: steps)"
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
    changes = {equal: equal_changes(equal, files, args.set, args.runs) for equal in args.equal}
    tables: dict[str, list[Row]] = {equal: [] for equal in args.equal}
    for equal in args.equal:
        for file, config, more in zip(files, configs, changes[equal], strict=True):
            overrides = [*args.set, *more]
            numbers = [
                measure(file, args.runs / run_name(config, seed, more), seed, overrides, args.prompts)
                for seed in args.seeds
            ]
            tables[equal].append(summary(file, overrides, numbers))
        print_tables(tables[equal], f"shapes, {len(args.seeds)} seeds, equal {equal}")
    if args.out:
        args.out.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
