"""Does one of the runs on real pictures from end to end: data, training, samples, judges, and a page of the results.

    make real DATA=FOLDER SET=cifar10_t2i ARGS="--precision bf16"
    python evals/real_pictures.py --data FOLDER --set emoji_t2i train.duration.steps=2000

FOLDER has cifar10/{train,test}.parquet, emoji/emoji.parquet and taef2/{encoder,decoder}.safetensors, as far as the set
needs them. Every stage is a command and is printed before it runs. Started again, it resumes where it stopped. The page
is real.html in the run's folder.
"""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from dico_t2i.command import positive, run, script_parser
from evals.real.page import write_page
from evals.real.prompts import CIFAR10_TEMPLATES, EMOJI_TEMPLATES, held_out_prompts
from evals.real.stages import (
    PICTURES,
    Judging,
    Stage,
    sample_classes,
    sample_prompts,
    write_class_prompts,
    write_prompts,
)

SETS = ("cifar10_t2i", "cifar10_latent_t2i", "cifar10_class", "emoji_t2i")
PREPARED = Path("data")
CLASSIFIER = Path("weights/cifar10.safetensors")
CAPTIONS = 4  # of each image of CIFAR-10, drawn from the templates
HOLD_OUT = ("--hold-out", "code=0.1", "--hold-out-one-of", "style=flat,3d", "--background", "white")


@dataclass(frozen=True)
class Plan:
    """source: the folder of the sets. pictures: how many are judged; free: of words that were never trained.

    precision: of the autoencoder's encoder, of the training, and of the classifier's.
    """

    source: Path
    name: str
    pictures: int
    free: int
    overrides: tuple[str, ...]
    precision: str = "fp32"

    @property
    def run(self) -> Path:
        return Path("runs") / self.name

    @property
    def emoji(self) -> bool:
        return self.name == "emoji_t2i"

    @property
    def latents(self) -> bool:
        return self.name != "cifar10_t2i"

    def stages(self) -> Iterator[Stage]:
        """All stages, in order."""
        yield from self._emoji_data() if self.emoji else self._cifar10_data()
        yield Stage(
            "train", ["-m", "dico_t2i", "train", "--config", f"configs/real/{self.name}.yaml", *self._changes()]
        )
        by_class = self.name == "cifar10_class"
        yield sample_classes(self.run, self.pictures) if by_class else sample_prompts(self.run, PICTURES)
        if self._has_free:
            yield sample_prompts(self.run, "free")
        yield self._judge()

    def _changes(self) -> list[str]:
        changes = [f"autoencoder.path={self.source / 'taef2'}"] if self.latents else []
        return [*changes, f"train.precision={self.precision}", *self.overrides]

    def _cifar10_data(self) -> Iterator[Stage]:
        source = ["--data", str(self.source / "cifar10")]
        captions = ["--templates", *CIFAR10_TEMPLATES, "--templates-per-sample", str(CAPTIONS)]
        how = ["--label-column", "label", *captions, "--crop", "none"]
        parts = {"cifar10": ["train"], "cifar10_test": ["test"]}
        if self.latents:
            parts["cifar10_val"] = ["test", "--hold-out", "file_name=0.2", "--held-out"]
        for out, split in parts.items():
            yield self._import(out, [*source, "--split", *split, *how])
        if self.latents:
            for out in ("cifar10", "cifar10_val"):
                yield self._encode(out)
        split = ["--train", str(PREPARED / "cifar10"), "--test", str(PREPARED / "cifar10_test")]
        command = ["evals/train_classifier.py", *split, "--out", str(CLASSIFIER), "--precision", self.precision]
        yield Stage("classifier", command, CLASSIFIER)

    def _emoji_data(self) -> Iterator[Stage]:
        how = ["--data", str(self.source / "emoji"), "--templates", *EMOJI_TEMPLATES, "--crop", "none", *HOLD_OUT]
        for out, part in (("emoji", []), ("emoji_held_out", ["--held-out"])):
            yield self._import(out, [*how, *part])
            yield self._encode(out)

    def _import(self, out: str, options: Sequence[str]) -> Stage:
        command = ["data_prep/huggingface.py", *options, "--out", str(PREPARED / out)]
        return Stage(f"import {out}", command, PREPARED / out / "index.json")

    def _encode(self, name: str) -> Stage:
        places = ["--data", str(PREPARED / name), "--out", str(PREPARED / f"{name}_latents")]
        how = ["--kind", "tiny", "--autoencoder", str(self.source / "taef2"), "--scale", "1", "--size", "64"]
        command = ["data_prep/latents.py", *places, *how, "--crop", "resize", "--no-mirror", "--dtype", self.precision]
        return Stage(f"encode {name}", command, PREPARED / f"{name}_latents" / "index.json")

    @property
    def _has_free(self) -> bool:
        return not self.emoji and self.name != "cifar10_class"

    def write_prompts(self) -> None:
        """Write the prompts that will be sampled; those of held-out emoji are captions of their shards."""
        if self.emoji:
            write_prompts(self.run / f"{PICTURES}.txt", held_out_prompts(PREPARED / "emoji_held_out", self.pictures))
        else:
            write_class_prompts(self.run, self.pictures, self.free)

    def _judge(self) -> Stage:
        if not self.emoji:
            judging = Judging(PREPARED / "cifar10", PREPARED / "cifar10_test", CLASSIFIER)
            return judging.stage(self.run, free=self._has_free)
        result = self.run / "judged.json"
        places = ["--images", str(self.run / PICTURES), "--checkpoint", str(self.run), "--out", str(result)]
        shards = ["--data", str(PREPARED / "emoji"), "--held-out", str(PREPARED / "emoji_held_out")]
        return Stage("judge", ["evals/judge_emoji.py", *places, *shards], result)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="the folder of the sets and of taef2")
    add("--set", choices=SETS, default=SETS[0], help=f"which run (default: {SETS[0]})")
    add("--pictures", type=positive, default=1000, help="pictures to judge (default: 1000)")
    add("--free", type=positive, default=400, help="pictures of words that were never trained (default: 400)")
    add(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="bf16 for CPUs with AMX or AVX-512 in bf16: less time (default: fp32)",
    )
    add("overrides", nargs="*", metavar="key.path=value", help="changes to the config")
    args = parser.parse_args(argv)
    plan = Plan(args.data.resolve(), args.set, args.pictures, args.free, tuple(args.overrides), args.precision)
    console, seconds = Console(), dict[str, float]()
    for stage in plan.stages():
        if stage.name == PICTURES:
            plan.write_prompts()
        if stage.result and stage.result.exists():
            console.print(f"[bold]{stage.name}[/]: done already")
            continue
        console.print(f"[bold]{stage.name}[/]: python {' '.join(stage.command)}", highlight=False, soft_wrap=True)
        started = time.monotonic()
        code = subprocess.run([sys.executable, *stage.command], check=False).returncode
        if code:
            return code
        seconds[stage.name] = time.monotonic() - started
    table = Table("stage", "seconds", title=plan.name)
    for name, value in seconds.items():
        table.add_row(name, f"{value:.0f}")
    console.print(table)
    print(f"page: {write_page(plan.run)}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
