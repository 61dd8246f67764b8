"""Teaches a model of shapes a new colour by an adapter (LoRA), and measures what it then makes of new and old prompts.

    make quickstart
    python evals/new_colour.py
    python evals/new_colour.py train.duration.steps=600 adapter.rank=16

Renders 50 images of one brown shape, trains configs/quickstart_brown.yaml on them and on as many samples of the
quickstart's data, exports the adapter as a file and samples with and without it: all scenes with one brown shape that
are not among the 50, and held-out combinations of the old colours, as evals/prompt_accuracy.py has them. Samples are
read like there, with brown among the colours. Started again, it resumes where it stopped.
"""

import io
import json
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from data_prep.common import finished_or_absent, is_finished
from data_prep.shapes_scene import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Object,
    Palette,
    Scene,
    captions,
    held_out_prompts,
    render,
)
from dico_t2i.command import run, script_parser
from dico_t2i.config import load_config
from dico_t2i.data.writer import ShardWriter
from evals.comparison.programs import python
from evals.prompt_accuracy import PROPERTIES, accuracy
from evals.shapes.programs import samples

CONFIG = Path("configs/quickstart_brown.yaml")
NAME, BROWN = "brown", (120, 70, 20)
PALETTE: Palette = {**COLOURS, NAME: BROWN}
IMAGES, OLD_PROMPTS = 50, 240


def scenes(seed: int) -> list[Scene]:
    """All scenes with one brown shape, in random order; the first IMAGES are for training."""
    found = [
        Scene(background, (Object(size, NAME, shape, place),))
        for background, size, shape, place in product(BACKGROUNDS, SIZES, SHAPES, PLACES)
    ]
    return [found[number] for number in np.random.default_rng(seed).permutation(len(found))]


def make_data(out: Path, size: int, seed: int) -> None:
    """Write the images for training, each with all its captions; nothing if they are there already."""
    meta = {"source": "shapes", "colour": NAME, "samples": IMAGES, "size": size, "seed": seed}
    if is_finished(out, meta):
        return
    rng = np.random.default_rng(seed)
    with (
        finished_or_absent(out) as folder,
        ShardWriter(folder, kind="images", meta=meta, samples_per_shard=IMAGES) as writer,
    ):
        for number, scene in enumerate(scenes(seed)[:IMAGES]):
            png = io.BytesIO()
            Image.fromarray(render(scene, size, rng, PALETTE)).save(png, "PNG")
            labels = {"captions": captions(scene), "width": size, "height": size}
            writer.write({"__key__": f"{number:08d}", "png": png.getvalue(), "json": labels})


def prompts(seed: int) -> dict[str, list[tuple[str, Scene]]]:
    """The prompts with their scenes: those of the new colour, which are not trained on, and those of the old ones."""
    rng = np.random.default_rng(seed)
    new = [(str(rng.choice(captions(scene))), scene) for scene in scenes(seed)[IMAGES:]]
    return {NAME: new, "old colours": held_out_prompts(OLD_PROMPTS, seed)}


def measure(folder: Path, base: str, adapter: Path | None, seed: int) -> dict[str, dict[str, float]]:
    """Sample all prompts into ``folder``, and return the accuracies of each kind of prompts."""
    found = {}
    for name, asked in prompts(seed).items():
        options = ["--adapter", str(adapter)] if adapter else []
        images = samples(folder / name.replace(" ", "_"), base, asked, *options)
        found[name] = accuracy(images, [scene for _, scene in asked], PALETTE)
    return found


def print_table(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]], seconds: float) -> None:
    table = Table("prompts", "property", "before", "after", title=f"{IMAGES} images, {seconds:.0f} s of training")
    for name, numbers in before.items():
        for key in (*PROPERTIES, "all"):
            table.add_row(f"{name} ({numbers['n']})", key, f"{numbers[key]:.1%}", f"{after[name][key]:.1%}")
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of the run folders (default: runs)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images and of the prompts (default: 0)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help=f"changes to {CONFIG}")
    args = parser.parse_args(argv)
    config = load_config(CONFIG, args.overrides)
    assert config.init is not None
    (place,) = (source.path for source in config.data.mixture if source.name == NAME)
    make_data(Path(place), config.data.image_size, args.seed)
    folder = args.runs / config.name
    started = time.monotonic()
    python("-m", "dico_t2i", "train", "--config", str(CONFIG), "--runs", str(args.runs), *args.overrides)
    seconds = time.monotonic() - started
    adapter = folder / f"{NAME}.safetensors"
    if not adapter.exists():
        python("-m", "dico_t2i", "export", "--checkpoint", str(folder), "--out", str(adapter))
    before = measure(folder / "before", config.init.from_, None, args.seed)
    after = measure(folder / "after", config.init.from_, adapter, args.seed)
    print_table(before, after, seconds)
    result = {"before": before, "after": after, "seconds": seconds}
    (folder / "new_colour.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
