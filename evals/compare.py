"""Compare evaluated runs and checkpoints: a table, curves over steps, and a grid with the same prompts and seeds.

    python evals/compare.py runs/a runs/b --out comparison
    python evals/compare.py runs/a/evals/coco-uvit/00100000.json runs/b

Takes run folders (all their results), checkpoints (the results of that step) and result files. Only results with the
same protocol hash share a curve or a grid.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from dico_t2i.command import run, script_parser
from evals.quality.metrics import LABELS

Result = dict[str, Any]

_CELL = 160  # pixels of an image in the grid


def find_results(path: Path) -> list[Result]:
    """The results of a run, a checkpoint or a file, with ``path`` and ``run`` added. Raises ValueError without any."""
    if path.is_file():
        files = [path]
    elif path.parent.name == "checkpoints":
        step = int(path.name.split("-")[-1])
        files = sorted(path.parent.parent.glob(f"evals/*/{step:08d}.json"))
    else:
        files = sorted(path.glob("evals/*/*.json"))
    if not files:
        raise ValueError(f"{path}: it has no results; evaluate it first (evals/coco_fid.py, evals/imagenet_fid.py)")
    return [_read(file) for file in files]


def _read(path: Path) -> Result:
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        run_name = result["subject"].split(", ")[0]
        return {**result, "path": path, "run": run_name, "values": {k: result["numbers"].get(k) for k in LABELS}}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: it is not a result of an evaluation: {error!r}") from None


def groups(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results by protocol hash, each group in order of run and step."""
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: (r["run"], r["step"])):
        found.setdefault(result["protocol_hash"], []).append(result)
    return found


def table_of(results: Sequence[Result]) -> Table:
    """A table of the results with one protocol hash."""
    first = results[0]
    shown = [name for name in LABELS if any(r["values"][name] is not None for r in results)]
    comparable = "" if all(r["comparable"] for r in results) else ", NOT COMPARABLE"
    table = Table("run", "step", title=f"{first['protocol']['name']} {first['protocol_hash']}{comparable}")
    for name in shown:
        table.add_column(LABELS[name], justify="right")
    for result in results:
        cells = [_cell(result["values"][name], result["standard_errors"].get(name)) for name in shown]
        table.add_row(result["run"], str(result["step"]), *cells)
    return table


def _cell(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" + (f" ± {error:.2g}" if error else "")


def save_curves(results: Sequence[Result], path: Path) -> None:
    """Plot each metric over steps, with a line for each run."""
    from matplotlib.figure import Figure

    shown = [name for name in LABELS if any(r["values"][name] is not None for r in results)]
    figure = Figure(figsize=(4 * len(shown), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for run_name in sorted({r["run"] for r in results}):
            points = [(r["step"], r["values"][name]) for r in results if r["run"] == run_name]
            points = [point for point in points if point[1] is not None]
            axes.plot(*zip(*points, strict=True), marker="o", label=run_name) if points else None
        axes.set(xlabel="step", title=LABELS[name])
    figure.axes[0].legend()
    figure.suptitle(f"{results[0]['protocol']['name']} {results[0]['protocol_hash']}")
    figure.savefig(path, dpi=120)


def save_grid(results: Sequence[Result], path: Path) -> bool:
    """Draw the newest examples of each run side by side, a row for each prompt; False if a run has none.

    Raises ValueError if their prompts or seeds differ.
    """
    newest = list({result["run"]: result for result in results}.values())
    columns = [_examples(result) for result in newest]
    if not all(columns):
        return False
    rows = min(map(len, columns))
    for column in columns:
        for mine, first in zip(column[:rows], columns[0], strict=False):
            if mine[1:] != first[1:]:
                raise ValueError(f"{path}: prompts or seeds differ: {mine[1:]} and {first[1:]}")
    head, line = 20, 16
    grid = Image.new("RGB", (len(columns) * _CELL, head + rows * (_CELL + line)), "white")
    draw = ImageDraw.Draw(grid)
    for x, (result, column) in enumerate(zip(newest, columns, strict=True)):
        draw.text((x * _CELL + 2, 4), f"{result['run']} {result['step']}", fill="black", font_size=12)
        for y, (image, prompt, _) in enumerate(column[:rows]):
            top = head + y * (_CELL + line)
            grid.paste(image.resize((_CELL, _CELL)), (x * _CELL, top))
            if x == 0:
                text = prompt.encode("ascii", "replace").decode()
                draw.text((2, top + _CELL + 1), text[: len(columns) * _CELL // 6], fill="black", font_size=11)
    grid.save(path)
    return True


def _examples(result: Result) -> list[tuple[Image.Image, str, str]]:
    """The images, prompts and seeds that an evaluation saved beside its result."""
    found = []
    for file in sorted(result["path"].with_suffix(".examples").glob("*.png")):
        with Image.open(file) as image:
            texts = getattr(image, "text", {})
            found.append((image.convert("RGB"), texts.get("prompt", ""), texts.get("seed", "")))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("what", type=Path, nargs="+", help="run folders, checkpoints, result files")
    parser.add_argument(
        "--out", type=Path, default=Path("comparison"), help="folder for the pictures (default: comparison)"
    )
    args = parser.parse_args(argv)
    results = [result for path in args.what for result in find_results(path)]
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 160)
    for name, group in groups(results).items():
        console.print(table_of(group))
        stem = f"{group[0]['protocol']['name']}-{name}"
        save_curves(group, args.out / f"{stem}-curves.png")
        grid = args.out / f"{stem}-grid.png"
        print(args.out / f"{stem}-curves.png", *([grid] if save_grid(group, grid) else []), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
