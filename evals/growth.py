"""Measures how the networks' speed changes with the size of the latents: one pass and a training step, side by side.

    python evals/growth.py                                            # DiCo-S and peers of its size, on a CPU
    python evals/growth.py --networks DiCo-XL DiG-XL/2 DiS-H/2 --batch 16 --sizes 32 64 128

At each size all networks take turns on the same inputs, as in throughput.py. The time of a multiply-accumulate is the
time of the whole pass or step divided by the number of counted ones, scans included. The last column says how many
times faster the first network is. Results go to --out as growth.md, growth.png and growth.json.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from dico_t2i.command import run, script_parser
from dico_t2i.files import write_atomically
from evals.speed.measure import compare, free_memory
from evals.throughput import by_name, describe

NETWORKS = ("DiCo-S", "DiT-S/2", "DiG-S/2", "DiS-S/2", "DiM-S/2")
WORKS = {"pass": "one pass", "step": "training step"}


@dataclass(frozen=True)
class Row:
    """A network at one size.

    gmacs: of one image, with the backward pass for a step. seconds: of the batch, in each round. faster: how many times
    as fast the first network is, as the median of the ratios of all rounds.
    """

    network: str
    work: str
    size: int
    batch: int
    gmacs: float
    seconds: tuple[float, ...]
    faster: float

    @property
    def median(self) -> float:
        return _median(self.seconds)

    @property
    def images_per_s(self) -> float:
        return self.batch / self.median

    @property
    def ps_per_mac(self) -> float:
        return 1e12 * self.median / (1e9 * self.gmacs * self.batch)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def measure(
    names: Sequence[str], sizes: Sequence[int], batch: int, rounds: int, device: torch.device, console: Console
) -> list[Row]:
    """Yield a row for each network, kind of work and size."""
    rows = []
    for size in sizes:
        for work, case in by_name(names, batch, size).items():
            results = compare(list(case.contenders(device)), rounds, device, profiled=False)
            free_memory(device)
            first = results[0].seconds
            for result in results:
                assert result.cost is not None
                ratios = [theirs / own for own, theirs in zip(first, result.seconds, strict=True)]
                gmacs = result.cost.flops / 2e9 / batch
                row = Row(result.name, work, size, batch, gmacs, tuple(result.seconds), _median(ratios))
                console.print(f"{size}x{size}, {WORKS[work]}, {row.network}: {row.images_per_s:.3g} images/s")
                rows.append(row)
    return rows


def markdown(rows: Sequence[Row]) -> str:
    head = "| latents | work | network | images/s | GMACs | ps per MAC | the first is faster by |"
    lines = [head, "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = (f"{row.images_per_s:.3g}", f"{row.gmacs:.2f}", f"{row.ps_per_mac:.2f}", f"{row.faster:.2f}")
        lines.append(f"| {row.size}x{row.size} | {WORKS[row.work]} | {row.network} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Plot how many times faster the first network is, by size, with a panel for each kind of work."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for panel, (work, name) in zip(figure.subplots(1, 2, sharey=True), WORKS.items(), strict=True):
        for network in dict.fromkeys(row.network for row in rows):
            own = [row for row in rows if (row.network, row.work) == (network, work)]
            panel.plot([row.size for row in own], [row.faster for row in own], marker="o", label=network)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes := sorted({row.size for row in rows}), [f"{size}x{size}" for size in sizes])
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("latents")
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"time, as a multiple of {rows[0].network}'s")
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--networks", nargs="+", default=NETWORKS, metavar="NAME", help="the others are compared with the first"
    )
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=(16, 32, 64), help="sizes of latents (default: 16 32 64)"
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", type=torch.device, help="default: the GPU if there is one")
    parser.add_argument("--out", type=Path, default=Path("runs/growth"), help="default: runs/growth")
    args = parser.parse_args(argv)
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(stderr=True, highlight=False)
    rows = measure(args.networks, args.sizes, args.batch, args.rounds, device, console)
    setting = {key: value for key, value in describe(device, args.rounds, 0.0).items() if key != "peak"}
    args.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join([*(f"{key}: {value}  " for key, value in setting.items()), "", markdown(rows), ""])
    write_atomically(args.out / "growth.md", text.encode())
    content = {**setting, "rows": [asdict(row) for row in rows]}
    write_atomically(args.out / "growth.json", (json.dumps(content, indent=1) + "\n").encode())
    plot(rows, setting["device"], args.out / "growth.png")
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
