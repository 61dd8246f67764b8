"""Shows every config of configs/: its size, and a small network of the same kind, trained and sampled on shapes.

    python evals/every_config.py
    python evals/every_config.py configs/ablations/*.yaml --steps 20 --out every_config.json

Parameters and multiply-accumulates (convolutions, matrix products and attention, for one image) are those of the
config. The trained network has the same switches, objective, optimizer and sampler, but is narrow and shallow, and uses
32 x 32 pixels and random encoders. This shows that everything works together, and nothing about quality. The losses are
means of the first and of the last five steps.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from data_prep.shapes import make_sample
from dico_t2i.command import run, script_parser
from dico_t2i.config import Config, load_config, parse_config
from dico_t2i.data.writer import ShardWriter
from dico_t2i.models import count_macs, count_parameters
from dico_t2i.runs.log import reports

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SIZE, SAMPLES, BATCH, WIDTH = 32, 64, 8, 32
TOWER = {"width": WIDTH, "layers": 1, "heads": 4}
# The settings of a small network; only those that its kind has are used.
SMALL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "depths": [1, 1, 1, 1, 1],
    "depth": 3,
    "num_heads": 4,
    "latent_size": SIZE,
}


def all_configs() -> list[Path]:
    """The files that are runs; those named base... contain settings that runs share."""
    found = (path for path in CONFIGS.rglob("*.yaml") if not path.name.startswith("base"))
    return sorted(path for path in found if path.parent != CONFIGS / "cluster")


def small(config: Config, data: Path, steps: int) -> Config:
    """The same run with a small network and random encoders, on images of SIZE pixels in ``data``."""
    tree = config.model_dump(mode="json", exclude_none=True)
    towers = tree["text_encoder"]["also"]
    for tower in (tree["text_encoder"], *towers):
        tower.update(weights="seeded", seeded=TOWER)
    sizes = {key: size for key, size in SMALL.items() if key in tree["model"]}
    model = {**tree["model"], **sizes, "in_channels": 3, "text_dim": WIDTH}
    if model.get("text_inputs"):
        model["text_inputs"] = [[tokens, WIDTH] for tokens, _ in model["text_inputs"]]
        model["text_inputs_width"] = WIDTH
    model["pooled_dim"] = WIDTH * (1 + sum(tower["kind"] != "t5" for tower in towers))
    tree.update(model=model, autoencoder={"kind": "pixels"}, preview={}, checkpoint={}, cluster={})
    tree["data"] = {"path": str(data), "image_size": SIZE, "flip": False, "streams": BATCH, "workers": 0}
    tree["optimizer"].pop("warmup", None)
    for key in ("validation", "init", "adapter", "stages"):
        tree.pop(key, None)
    tree["train"] = {"duration": {"steps": steps}, "global_batch": BATCH, "micro_batch": BATCH, "precision": "fp32"}
    tree["log"] = {"every": {"steps": 1}, "wandb": "disabled"}
    tree["sampler"]["steps"] = 5
    if "alignment" in tree:
        encoder = {**tree["alignment"]["encoder"], "weights": "seeded", "seeded": TOWER, "image_size": 56}
        encoder["kind"] = encoder["kind"].replace("tiny", "timm")  # which has a seeded form
        tree["alignment"] |= {"block": "stages.middle.0", "hidden": WIDTH, "encoder": encoder}
    return parse_config(tree, config.name)


def make_data(root: Path) -> None:
    """Write shapes with captions and classes."""
    with ShardWriter(root, SAMPLES) as writer:
        for number in range(SAMPLES):
            sample = make_sample(number, size=SIZE, seed=0, two_objects=0.2, held_out=False)
            writer.write({**sample, "cls": str(number % 10).encode()})


def train_and_sample(config: Config, runs: Path) -> dict[str, float]:
    """The losses of a small run, whose samples are saved with it. Raises ValueError if training or sampling does."""
    import torch

    from dico_t2i.sampling.images import save_images
    from dico_t2i.sampling.pipeline import load_pipeline
    from dico_t2i.training.trainer import train

    folder, condition = runs / config.name, 0 if config.model.condition == "class" else "a large red circle"
    with (runs / "output.txt").open("w") as output, redirect_stdout(output):
        train(config, runs)
    pipeline = load_pipeline(folder, None, torch.device("cpu"), torch.float32)
    save_images(pipeline.generate([condition], [0], config.sampler), [str(condition)], [0], folder / "out")
    losses = [line["loss"] for line in reports(folder / "metrics.jsonl")]
    return {"first_loss": statistics.fmean(losses[:5]), "last_loss": statistics.fmean(losses[-5:])}


def measure(paths: Sequence[Path], steps: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each config; with ``steps`` 0 nothing is trained."""
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "data")
        make_data(data)
        for path in paths:
            config = load_config(path)
            shape = (1, config.model.in_channels, config.latent_size, config.latent_size)
            row = {"config": str(path.resolve().relative_to(CONFIGS)), "parameters": count_parameters(config.model)}
            row["macs"] = count_macs(config.model, shape)
            yield row | (train_and_sample(small(config, data, steps), Path(scratch)) if steps else {})


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| config | parameters, M | GMACs | loss, first to last steps |", "| --- | --- | --- | --- |"]
    for row in rows:
        losses = f"{row['first_loss']:.3f} to {row['last_loss']:.3f}" if "first_loss" in row else ""
        lines.append(f"| `{row['config']}` | {row['parameters'] / 1e6:.1f} | {row['macs'] / 1e9:.2f} | {losses} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("configs", nargs="*", type=Path, metavar="CONFIG", help="default: all of configs/")
    parser.add_argument("--steps", type=int, default=20, help="training steps; with 0 it only counts (default: 20)")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    args = parser.parse_args(argv)
    paths = args.configs or all_configs()
    console = Console(stderr=True)
    rows = list(track(measure(paths, args.steps), "configs", len(paths), console=console))
    print(markdown(rows))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
