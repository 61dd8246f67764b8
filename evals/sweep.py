"""Evaluate several guidance scales and steps of the sampler: FID against CLIP score, or against the Inception Score.

    python evals/sweep.py coco --guidance 1,1.5,2,3 --steps 25,50 --checkpoint runs/NAME --images coco/val2014 \\
        --captions coco/annotations/captions_val2014.json --protocol coco-uvit --set prompts.count=5000
    torchrun --nproc-per-node 8 evals/sweep.py imagenet --guidance 1,1.2,1.4 --checkpoint runs/NAME --reference FILE.npz

All other options are those of evals/coco_fid.py and evals/imagenet_fid.py. An interrupted sweep resumes when it is
started again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from dico_t2i.command import positive, run
from evals import coco_fid, imagenet_fid
from evals.quality.options import chosen_protocol
from evals.quality.protocol import load_protocol

_SCRIPTS: dict[str, Any] = {"coco": coco_fid, "imagenet": imagenet_fid}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in _SCRIPTS:
        print(__doc__)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    script = _SCRIPTS[argv[0]]
    parser = script.parser()
    parser.prog = f"sweep.py {argv[0]}"
    parser.add_argument("--guidance", type=_floats, required=True, metavar="W,W", help="values of sampler.guidance")
    parser.add_argument(
        "--steps", type=_counts, metavar="N,N", help="values of sampler.steps (default: the protocol's)"
    )
    args = parser.parse_args(argv[1:])
    protocol = chosen_protocol(args)
    across = plotted(args.metrics)
    steps = args.steps or [protocol.sampler.steps]
    points = [
        load_protocol(args.protocol, [*args.set, f"sampler.guidance={w}", f"sampler.steps={n}"])
        for n in steps
        for w in args.guidance
    ]
    evaluation = script.prepare(args, protocol)
    results = [evaluation.run(point) for point in points]
    if evaluation.world.is_main:
        path = evaluation.folder / f"sweep-{protocol.name}-{protocol.hash()}-{evaluation.subject.step:08d}.png"
        save_plot([result for result in results if result], across, path)
        print(f"plot: {path}")
    return 0


def plotted(metrics: Sequence[str]) -> str:
    """The metric that FID is plotted against. Raises ValueError without FID and another metric."""
    across = next((name for name in ("clip", "is", "kid") if name in metrics), None)
    if across is None or "fid" not in metrics:
        raise ValueError("--metrics: to plot, fid and one of clip, is, kid are needed")
    return across


def save_plot(results: Sequence[dict[str, Any]], across: str, path: Path) -> None:
    """Plot FID against the metric ``across``, with a line through the guidances for each number of steps."""
    from matplotlib.figure import Figure

    from evals.quality.metrics import LABELS

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for steps in sorted({r["protocol"]["sampler"]["steps"] for r in results}):
        line = [r for r in results if r["protocol"]["sampler"]["steps"] == steps]
        line.sort(key=lambda r: r["protocol"]["sampler"]["guidance"])
        x, y = ([r["numbers"][name] for r in line] for name in (across, "fid"))
        axes.plot(x, y, marker="o", label=f"{steps} steps")
        for r, *point in zip(line, x, y, strict=True):
            label = f"{r['protocol']['sampler']['guidance']:g}"
            axes.annotate(label, (point[0], point[1]), textcoords="offset points", xytext=(4, 4))
    axes.set(xlabel=LABELS[across], ylabel="FID", title=f"{results[0]['subject']}: {results[0]['protocol']['name']}")
    axes.legend(title="labels: guidance")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _counts(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(run(main))
