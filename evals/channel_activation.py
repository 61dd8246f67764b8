"""Measures how many channels of a network are active, and how diverse its features are (paper, redundancy figure).

    python evals/channel_activation.py --checkpoint runs/dico_s_imagenet256 runs/dico_s_no_cca --out runs/channels

It analyses the output of the last block's mixer, or of --module, on data that is noised to fixed timesteps. ReLU and
global average pooling give one score for each channel. Several checkpoints are drawn side by side; they may be runs,
single checkpoints, exports, or released weights that `dico import-official` converted. --out gets channels.json and a
PNG.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from dico_t2i.command import run, script_parser
from dico_t2i.files import write_atomically
from dico_t2i.sampling.pipeline import Pipeline, load_pipeline
from evals.analysis.channels import ChannelStatistics, last_mixer, watch
from evals.analysis.samples import chunks, run_network

Result = dict[str, Any]
NUMBERS = ("alive", "participation", "effective_rank", "correlation")


def look_at(pipeline: Pipeline, args: argparse.Namespace) -> Result:
    """The module's name, and its Diversity at each timestep."""
    steps = pipeline.config.diffusion.steps
    outside = [timestep for timestep in args.timesteps if not 0 <= timestep < steps]
    if outside:
        raise ValueError(f"--timesteps {outside[0]}: must lie in 0..{steps - 1}")
    module = args.module or last_mixer(pipeline.model)
    statistics = {timestep: ChannelStatistics() for timestep in args.timesteps}
    for chunk in chunks(pipeline, args.data, args.samples, args.batch):
        for timestep, sums in statistics.items():
            watching = watch(pipeline.model, module, sums)
            run_network(pipeline, chunk, timestep)
            watching.remove()
    return {"module": module, "timesteps": {str(t): asdict(sums.report()) for t, sums in statistics.items()}}


def names_of(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that distinguish them."""
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ValueError("--checkpoint: the same checkpoint is given twice")
    length = next(n for n in range(1, 100) if len({p.parts[-n:] for p in resolved}) == len(resolved))
    return ["/".join(path.parts[-length:]) for path in resolved]


def plot(results: dict[str, Result], path: Path) -> None:
    """Plot the sorted scores over the rank of the channel, with one panel for each timestep."""
    from matplotlib.figure import Figure

    timesteps = list(next(iter(results.values()))["timesteps"])
    figure = Figure(figsize=(4.5 * len(timesteps), 3.5), layout="constrained")
    for panel, timestep in zip(figure.subplots(1, len(timesteps), squeeze=False)[0], timesteps, strict=True):
        for name, result in results.items():
            scores = result["timesteps"][timestep]["scores"]
            panel.plot([(i + 0.5) / len(scores) for i in range(len(scores))], scores, label=name)
        panel.set_title(f"timestep {timestep}", fontsize=9)
        panel.set_xlabel("channels, by score")
        panel.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("activation score")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def table(results: dict[str, Result]) -> Table:
    shown = Table("checkpoint", "module", "timestep", "channels", *NUMBERS)
    for name, result in results.items():
        for timestep, found in result["timesteps"].items():
            numbers = [f"{found[key]:.3f}" for key in NUMBERS]
            shown.add_row(name, result["module"], timestep, str(len(found["scores"])), *numbers)
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, nargs="+", required=True, help="runs, checkpoints or exports")
    add("--out", type=Path, required=True, help="folder of results")
    add("--data", help="shards to use (default: those that each checkpoint was trained on)")
    add("--weights", help="weight, or an average such as ema_0.9999 (default: the first average)")
    add("--module", help="path of the module in the network (default: the last block's mixer)")
    add(
        "--timesteps",
        type=int,
        nargs="+",
        default=[100, 500, 900],
        help="timesteps to analyse (default: 100 500 900, of 1000)",
    )
    add("--samples", type=int, default=64, help="samples to analyse (default: 64)")
    add("--batch", type=int, default=16, help="samples of one pass (default: 16)")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    console = Console(width=max(120, Console().width))
    for name, path in zip(names_of(args.checkpoint), args.checkpoint, strict=True):
        console.print(f"{len(results) + 1}/{len(args.checkpoint)} {name}", highlight=False)
        results[name] = look_at(load_pipeline(path, args.weights, device, torch.float32), args)
        content = {"samples": args.samples, "checkpoints": results}
        write_atomically(args.out / "channels.json", (json.dumps(content, indent=1) + "\n").encode())
        plot(results, args.out / "channels.png")
    console.print(table(results))
    console.print(f"channels.json and channels.png in {args.out}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
