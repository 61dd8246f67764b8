"""Measures how local the attention of diffusion transformers is: maps around the query, by layer (paper, figure 4).

    python evals/attention_locality.py --model facebook/DiT-XL-2-256 --kind dit --out runs/locality/dit
    python evals/attention_locality.py --model PixArt-alpha/PixArt-XL-2-256x256 --kind pixart --out runs/locality/pixart
    python evals/attention_locality.py --model black-forest-labs/FLUX.1-schnell --kind flux --out runs/locality/flux

Attention is recorded while the network generates images from noise, at the evaluations nearest to --timesteps. The
results for each layer are the mean distance from query to key in tokens, the shares of attention within 3x3 and 5x5
tokens, and the average map around the query, over heads, queries and samples. Those of uniform attention are shown for
comparison. --out gets locality.json and a PNG for each timestep. Text features are zeros, or those in --text FILE:
safetensors with "tokens" (T, dim) and, for FLUX, "pooled" (dim,).
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from dico_t2i import randomness
from dico_t2i.command import progress_bar, run, script_parser
from dico_t2i.diffusion import sample
from dico_t2i.files import write_atomically
from evals.analysis.backbones import KINDS, Backbone, Flux, load_backbone
from evals.analysis.locality import WINDOWS, Locality, RelativeMap, locality, uniform_shares
from evals.analysis.recording import recording

Maps = dict[str, RelativeMap]  # by layer
_PANELS, _COLUMNS = 12, 6  # most layers whose maps are drawn, and maps per row


def record(backbone: Backbone, timesteps: Sequence[int], steps: int, samples: int, seed: int) -> dict[int, Maps]:
    """Relative maps of each layer at the evaluations nearest to the timesteps; the keys are the evaluated timesteps.

    Raises ValueError for timesteps outside the process.
    """
    outside = [t for t in timesteps if not 0 <= t <= backbone.diffusion.steps]
    if outside:
        raise ValueError(f"--timesteps {outside[0]}: must lie in 0..{backbone.diffusion.steps}")
    evaluated = backbone.timesteps(steps)
    wanted = {min(range(steps), key=lambda number: abs(evaluated[number] - t)) for t in timesteps}
    found: dict[int, Maps] = {}
    index = torch.arange(samples, device=backbone.device)
    done = 0
    with progress_bar() as bar:
        task = bar.add_task("evaluations", total=steps)

        def network(x: Tensor, t: Tensor) -> Tensor:
            nonlocal done
            done += 1
            bar.update(task, completed=done)
            if done - 1 not in wanted:
                return backbone(x, t)
            maps = found[round(float(t[0]))] = {name: RelativeMap(backbone.grid) for name in backbone.layers}

            def add(layer: str, heads: Iterable[Tensor]) -> None:
                maps[layer].add(heads)

            with recording(backbone.layers, backbone.grid[0] * backbone.grid[1], add):
                return backbone(x, t)

        sample(
            backbone.diffusion,
            backbone.sampler_config(steps),
            network,
            randomness.normal(seed, "initial noise", index, backbone.shape),
            lambda _step: torch.empty(0),  # deterministic samplers use none
            backbone.learn_sigma,
        )
    return found


def numbers(maps: Maps) -> dict[str, Locality]:
    """The numbers of each layer. Raises ValueError if a layer did not call torch's attention."""
    silent = [name for name, seen in maps.items() if not seen.queries]
    if silent:
        raise ValueError(f"{silent[0]}: it computes its attention without torch's scaled_dot_product_attention")
    return {name: seen.locality() for name, seen in maps.items()}


def plot(maps: Maps, title: str, path: Path) -> None:
    """Plot the numbers by layer and, below, the average maps of some layers, with logarithmic colours.

    The query is in the middle of a map.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    count = min(_PANELS, len(maps))
    rows = -(-count // _COLUMNS)
    heights = (3.2, 2.2 * rows)
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    _plot_numbers(numbers(maps), locality(uniform_shares(next(iter(maps.values())).grid)), above.subplots(1, 2))
    chosen = [list(maps)[round(i * (len(maps) - 1) / max(1, count - 1))] for i in range(count)]
    panels = below.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for panel, name in zip(panels, chosen, strict=False):
        picture, (h, w) = maps[name].picture().numpy(), maps[name].grid
        norm = LogNorm(picture.max() / 1e3, picture.max())
        panel.imshow(picture, norm=norm, extent=(0.5 - w, w - 0.5, h - 0.5, 0.5 - h))
        panel.set_title(name.replace("transformer_blocks", "block"), fontsize=8)
        panel.tick_params(labelsize=7)
    for panel in panels[count:]:
        panel.set_axis_off()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def _plot_numbers(layers: dict[str, Locality], uniform: Locality, panels: Any) -> None:
    left, right = panels
    for panel in panels:
        panel.xaxis.get_major_locator().set_params(integer=True)
    left.plot([layer.distance for layer in layers.values()], "o-", markersize=3)
    left.axhline(uniform.distance, linestyle=":", color="tab:grey", label="uniform attention")
    left.set(xlabel="layer", ylabel="mean distance, tokens", ylim=(0, 1.2 * uniform.distance))
    left.legend(fontsize=8)
    for colour, side in zip(("tab:blue", "tab:orange"), WINDOWS, strict=True):
        right.plot(
            [layer.window[side] for layer in layers.values()], "o-", markersize=3, color=colour, label=f"{side}x{side}"
        )
        right.axhline(uniform.window[side], linestyle=":", color=colour)
    right.set(xlabel="layer", ylabel="share of attention", ylim=(0, 1))
    right.legend(fontsize=8)


def table(found: dict[int, dict[str, Locality]], uniform: Locality) -> Table:
    """A table of the means over the layers."""
    shown = Table(
        "timestep", "layers", "mean distance", *[f"within {side}x{side}" for side in WINDOWS], "outside image"
    )
    for timestep, layers in found.items():
        every = list(layers.values())
        means = [
            sum(x) / len(every) for x in zip(*[(v.distance, *v.window.values(), v.outside) for v in every], strict=True)
        ]
        shown.add_row(str(timestep), str(len(every)), *[f"{mean:.3f}" for mean in means])
    values = (uniform.distance, *uniform.window.values(), 0.0)
    shown.add_row("uniform", "", *[f"{value:.3f}" for value in values])
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a diffusers pipeline, or of its network")
    add("--kind", choices=tuple(KINDS), required=True)
    add("--out", type=Path, required=True, help="folder of results")
    add("--text", type=Path, help="safetensors of text features (default: zeros)")
    add("--grid", type=int, help=f"for FLUX: image tokens per side (default: {Flux.side}, 512 pixels)")
    add(
        "--timesteps",
        type=int,
        nargs="+",
        default=[100, 500, 900],
        help="timesteps to record (default: 100 500 900, of 1000)",
    )
    add("--steps", type=int, default=20, help="evaluations from noise to images (default: 20)")
    add("--samples", type=int, default=4, help="images to generate (default: 4)")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    backbone = load_backbone(args.kind, args.model, args.text, device, dtype)
    if args.grid is not None:
        if not isinstance(backbone, Flux):
            raise ValueError(f"--grid: it is only for --kind flux; a {args.kind} has a fixed size")
        backbone.side = args.grid
    maps = record(backbone, args.timesteps, args.steps, args.samples, args.seed)
    found = {timestep: numbers(layers) for timestep, layers in maps.items()}
    uniform = locality(uniform_shares(backbone.grid))
    args.out.mkdir(parents=True, exist_ok=True)
    content = {
        "model": args.model,
        "grid": backbone.grid,
        "samples": args.samples,
        "uniform": asdict(uniform),
        "timesteps": {str(t): {name: asdict(v) for name, v in layers.items()} for t, layers in found.items()},
    }
    write_atomically(args.out / "locality.json", (json.dumps(content, indent=1) + "\n").encode())
    for timestep, layers in maps.items():
        plot(layers, f"{args.model}, timestep {timestep}", args.out / f"locality-{timestep:04d}.png")
    console = Console(width=max(120, Console().width))
    console.print(table(found, uniform))
    console.print(f"locality.json and {len(maps)} pictures in {args.out}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
