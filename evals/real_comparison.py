"""Compares networks on CIFAR-10 at equal steps or at equal CPU time: accuracy, Frechet distance, loss, channels.

    python evals/real_comparison.py configs/real/claims/dico.yaml configs/real/claims/dit.yaml --equal time --jobs 2
    python evals/real_comparison.py --set autoencoder.path=../real/taef2 --out compared.json

Each network and seed is a separate run, runs/NAME-SEED, on one thread; its output is in runs/NAME-SEED.log. --jobs 2
works on two runs at the same time. Started again, the same command resumes: what is trained, sampled or judged stays.
At equal time, in runs/NAME-SEED-time, each network takes as many steps as fit into the time that the first one needs
for its own; CPU seconds per step are measured for this, in turns, and kept in runs/step_seconds.json.

Class-conditional runs are asked for their classes, the others for the prompts of docs/real.md. Pictures are judged as
by evals/judge_classes.py, channels as by evals/channel_activation.py at timestep 500. Means over the seeds have 95 %
confidence intervals (Student's t). "ratios" are the Frechet distances divided by those of the first network with the
same seed. The rows "real pictures" and "control" are those of the judges for the first network.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from dico_t2i.command import positive, run, script_parser
from dico_t2i.config import load_config
from evals.comparison.equal import EQUAL, ONE_THREAD, equal_changes, run_name
from evals.comparison.programs import python
from evals.comparison.summary import Row, ratios, shown, sizes, summary, training_numbers
from evals.real.results import read_verdicts
from evals.real.stages import PICTURES, Judging, Stage, sample_classes, sample_prompts, write_class_prompts

CLAIMS = Path("configs/real/claims")
TIMESTEP = 500
CHANNELS = {"alive": ".2f", "participation": ".2f", "effective_rank": ".2f", "correlation": ".3f"}
# What the judges' numbers are called here, and how they are shown.
JUDGED = {
    "pictures taken for their class": ("accuracy", ".1%"),
    "pictures of words never trained taken for their class": ("free_wording", ".1%"),
    "Frechet distance": ("frechet", ".2f"),
    "Frechet distance within classes": ("frechet_in_class", ".2f"),
    "near copies of training pictures": ("near_copies", ".1%"),
    "distance to the nearest training picture": ("nearest", ".2f"),
    "held-out loss": ("loss", ".4f"),
}
WIDTH = 190


@dataclass(frozen=True)
class Run:
    """A run of a comparison. folder: its run folder. overrides: the changes of its config."""

    file: Path
    folder: Path
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What is done with each run. pictures: how many are judged; free: those of words that were never trained."""

    judging: Judging
    pictures: int
    free: int

    def stages(self, run: Run) -> Iterator[Stage]:
        """All stages of a run, in order; the prompts are written once the run is trained."""
        folder = run.folder
        places = ["--config", str(run.file), "--runs", str(folder.parent)]
        yield Stage("train", ["-m", "dico_t2i", "train", *places, *run.overrides])
        by_class = load_config(run.file, run.overrides).model.condition == "class"
        if by_class:
            yield sample_classes(folder, self.pictures)
        else:
            write_class_prompts(folder, self.pictures, self.free)
            yield sample_prompts(folder, PICTURES)
            yield sample_prompts(folder, "free")
        yield self.judging.stage(folder, free=not by_class)
        out = folder / "channels"
        command = ["evals/channel_activation.py", "--checkpoint", str(folder), "--out", str(out)]
        yield Stage("channels", [*command, "--timesteps", str(TIMESTEP)], out / "channels.json")

    def carry_out(self, run: Run) -> None:
        """Do what is left of a run. Raises ValueError, with the file of its output, if a command fails."""
        for stage in self.stages(run):
            if stage.result is None or not stage.result.exists():
                log = run.folder.with_name(f"{run.folder.name}.log")
                python(*stage.command, environment=ONE_THREAD, log=log)


def carry_out_all(plan: Plan, runs: Sequence[Run], jobs: int) -> None:
    """Do all runs, ``jobs`` at a time. Raises ValueError that names those that failed once the others are done."""
    failed: list[str] = []
    with Progress(console=Console(stderr=True)) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("runs", total=len(runs))
        waiting: list[Future[None]] = [pool.submit(plan.carry_out, each) for each in runs]
        try:
            for done in as_completed(waiting):
                if error := done.exception():
                    failed.append(str(error))
                progress.advance(task)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # those that run have been interrupted, too
            raise
    if failed:
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed:\n  " + "\n  ".join(failed))


def numbers(run: Run) -> dict[str, float]:
    """The numbers of a finished run; those of real pictures and of the control have "_real" and "_control"."""
    found = training_numbers(run.folder)
    for verdict in read_verdicts(run.folder / "judged.json"):
        key, _ = JUDGED[verdict.name]
        values = {key: verdict.value, f"{key}_real": verdict.real, f"{key}_control": verdict.control}
        found |= {name: value for name, value in values.items() if value is not None}
    channels = json.loads((run.folder / "channels" / "channels.json").read_text(encoding="utf-8"))
    ((_, of_run),) = channels["checkpoints"].items()
    return found | {key: of_run["timesteps"][str(TIMESTEP)][key] for key in CHANNELS}


def print_tables(rows: Sequence[Row], title: str) -> None:
    """One table of the judges, with real pictures and the control, and one of the channels."""
    keys = {key: form for key, form in JUDGED.values() if any(key in row for row in rows)}
    judged = Table("network", "M parameters", "MMACs", "steps", "seconds", *keys, "ratios", title=title)
    channels = Table("network", "images/s", *CHANNELS, title=f"channels of the last block, timestep {TIMESTEP}")
    for row in rows:
        found = " ".join(f"{ratio:.2f}" for ratio in ratios(row, rows[0], "frechet"))
        judged.add_row(*sizes(row), *_cells(row, {"seconds": ".0f", **keys}), found)
        channels.add_row(sizes(row)[0], *_cells(row, {"images_per_s": ".0f", **CHANNELS}))
    for name, ending in (("real pictures", "_real"), ("control", "_control")):
        judged.add_row(name, *[""] * 4, *_cells(rows[0], {key + ending: form for key, form in keys.items()}))
    console = Console()
    console.width = max(console.width, WIDTH)  # narrower, names and numbers would be cut
    console.print(judged, channels)


def _cells(row: Row, forms: Mapping[str, str]) -> list[str]:
    return [shown(row[key], form) if key in row else "" for key, form in forms.items()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("configs", nargs="*", type=Path, metavar="CONFIG", help=f"default: those of {CLAIMS} with classes")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--equal", choices=EQUAL, default="steps", help="what all networks have alike (default: steps)")
    add("--jobs", type=positive, default=1, help="runs at the same time, of one thread each (default: 1)")
    add("--pictures", type=positive, default=2000, help="pictures to judge (default: 2000)")
    add("--free", type=positive, default=400, help="pictures of words that were never trained (default: 400)")
    add("--train", type=Path, default=Path("data/cifar10"), help="shards of the training split (data/cifar10)")
    add("--test", type=Path, default=Path("data/cifar10_test"), help="shards of the test split (data/cifar10_test)")
    add("--classifier", type=Path, default=Path("weights/cifar10.safetensors"), help="the classifier that judges")
    add("--loss-samples", type=positive, default=1024, help="samples for the held-out loss (default: 1024)")
    add("--runs", type=Path, default=Path("runs"), help="where run folders are (default: runs)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a change to all configs")
    add("--out", type=Path, help="JSON file for the numbers")
    args = parser.parse_args(argv)
    for place in (args.train, args.test, args.classifier):
        if not place.exists():
            raise ValueError(f"{place}: it is not there; docs/real.md has the commands that make it")
    files = args.configs or class_conditional()
    changes = equal_changes(args.equal, files, args.set, args.runs)
    args.runs.mkdir(parents=True, exist_ok=True)
    runs: dict[Path, list[Run]] = {}
    for file, more in zip(files, changes, strict=True):
        config = load_config(file, args.set)
        names = [(seed, run_name(config, seed, more)) for seed in args.seeds]
        runs[file] = [
            Run(file, args.runs / name, (*args.set, *more, f"name={name}", f"seed={seed}")) for seed, name in names
        ]
    judging = Judging(args.train, args.test, args.classifier, args.loss_samples)
    plan = Plan(judging, args.pictures, args.free)
    in_turns = [each for of_seed in zip(*runs.values(), strict=True) for each in of_seed]  # the first seed of all first
    carry_out_all(plan, in_turns, args.jobs)
    rows = [
        summary(file, [*args.set, *more], [numbers(each) for each in runs[file]])
        for file, more in zip(files, changes, strict=True)
    ]
    print_tables(rows, f"CIFAR-10, {len(args.seeds)} seeds, equal {args.equal}")
    if args.out:
        args.out.write_text(json.dumps({args.equal: rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def class_conditional() -> list[Path]:
    """The files of the claims that are conditioned on classes; DiCo's own is the first."""
    paths = [path for path in sorted(CLAIMS.glob("*.yaml")) if not path.name.startswith("base")]
    found = [path for path in paths if load_config(path).model.condition == "class"]
    return sorted(found, key=lambda path: path.stem != "dico")


if __name__ == "__main__":
    sys.exit(run(main))
