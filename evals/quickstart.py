"""Runs the complete path on two CPU cores: shapes, a small text-to-image DiCo, samples, prompt accuracy.

    python evals/quickstart.py

Every stage is a separate command and is printed before it runs. Started again, it resumes where it stopped.
"""

import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dico_t2i.command import run, script_parser
from dico_t2i.runs.log import reports

RUN = Path("runs/quickstart")
DATA = Path("data/shapes")
PROMPTS = RUN / "held_out_prompts.txt"
RESULT = RUN / "prompt_accuracy.json"
OVERVIEW = RUN / "overview.png"
PROMPT_COUNT = 240


def stages(overrides: list[str]) -> list[tuple[str, list[str]]]:
    """The name and the command of each stage."""
    samples = str(RUN / "held_out")
    sample = ["-m", "dico_t2i", "sample", "--checkpoint", str(RUN), "--prompts", str(PROMPTS)]
    accuracy = ["evals/prompt_accuracy.py"]
    return [
        (
            "data",
            ["data_prep/shapes.py", "--out", str(DATA), "--samples", "20000", "--size", "16", "--two-objects", "0.1"],
        ),
        ("train", ["-m", "dico_t2i", "train", "--config", "configs/quickstart.yaml", *overrides]),
        ("prompts", [*accuracy, "--write-prompts", str(PROMPTS), "--count", str(PROMPT_COUNT)]),
        ("sample", [*sample, "--out", samples, "--batch", "60"]),
        ("evaluate", [*accuracy, "--images", samples, "--out", str(RESULT)]),
    ]


def done(stage: str) -> bool:
    """Whether a stage's result exists already; training decides this itself."""
    results = {
        "data": DATA / "index.json",
        "prompts": PROMPTS,
        "sample": RUN / "held_out" / "grid.png",
        "evaluate": RESULT,
    }
    return stage in results and results[stage].exists()


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to configs/quickstart.yaml")
    console, seconds = Console(), {}
    for name, command in stages(parser.parse_args().overrides):
        if done(name):
            console.print(f"[bold]{name}[/]: done already")
            continue
        console.print(f"[bold]{name}[/]: python {' '.join(command)}", highlight=False)
        started = time.monotonic()
        code = subprocess.run([sys.executable, *command], check=False).returncode
        if code:
            return code
        seconds[name] = time.monotonic() - started
    _summary(console, seconds)
    return 0


def draw_overview(samples: Path, lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The first sixteen samples with their prompts, and the training loss over steps, as a small PNG."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    places = figure.add_gridspec(4, 7)
    for number, file in enumerate(sorted(samples.glob("0*.png"))[:16]):
        axes = figure.add_subplot(places[divmod(number, 4)])
        with Image.open(file) as image:
            axes.imshow(image)
            axes.set_title(textwrap.fill(str(image.info["prompt"]), 30), fontsize=5)
        axes.axis("off")
    curve = figure.add_subplot(places[:, 4:])
    curve.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=1)
    curve.set(xlabel="step", ylabel="training loss", yscale="log")
    curve.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=100)


def _summary(console: Console, seconds: dict[str, float]) -> None:
    table = Table("stage", "seconds", title="quickstart")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.0f}")
    table.add_row("all", f"{sum(seconds.values()):.0f}")
    console.print(table)
    lines = list(reports(RUN / "metrics.jsonl"))
    draw_overview(RUN / "held_out", lines, OVERVIEW)
    for last in lines[-1:]:
        console.print(
            f"training: {last['images_per_s']:.0f} images/s, peak memory {last['peak_memory_gb']:.2f} GB,"
            f" loss {last['loss']:.4f} after {last['step']} steps"
        )
    console.print(f"pictures: {RUN / 'held_out' / 'grid.png'} (held-out prompts), {RUN / 'samples'} (during training)")
    console.print(f"both beside the training loss: {OVERVIEW}")
    console.print(f"accuracy: {RESULT}")
    console.print("The text encoder is random (seeded), not pretrained: these numbers only show that the system works.")


if __name__ == "__main__":
    sys.exit(run(main))
