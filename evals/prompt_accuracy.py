"""Measures how often images of coloured shapes show what their prompts ask for.

python evals/prompt_accuracy.py --write-prompts prompts.txt --count 240
dico sample --checkpoint runs/quickstart --prompts prompts.txt --out samples
python evals/prompt_accuracy.py --images samples

The prompts are for combinations of colour, shape and background that data_prep/shapes.py keeps out of training. The
table's last column is the reader's accuracy on real renderings, which is the most that can be measured for a model.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from data_prep.shapes_scene import COLOURS, Palette, Scene, held_out_prompts, parse, render
from dico_t2i.command import run, script_parser
from dico_t2i.data.decode import decode_whole
from dico_t2i.data.errors import SampleError
from evals.shapes.reader import read

PROPERTIES = ("colour", "background", "shape", "place", "size")


def accuracy(images: NDArray[np.uint8], scenes: Sequence[Scene], colours: Palette = COLOURS) -> dict[str, float]:
    """The share of images that show their scene's colour, background, shape, place, size, all five; and ``n``.

    images: (N, size, size, 3) uint8. Each scene has one object. Raises ValueError if there are no images, or not as
    many as scenes.
    """
    if len(images) != len(scenes) or not len(scenes):
        raise ValueError(f"{len(images)} images for {len(scenes)} scenes; expected equal numbers, and at least one")
    right = np.array([_compare(image, scene, colours) for image, scene in zip(images, scenes, strict=True)])
    shares = dict(zip(PROPERTIES, right.mean(axis=0).tolist(), strict=True))
    return {**shares, "all": float(right.all(axis=1).mean()), "n": len(scenes)}


def _compare(image: NDArray[np.uint8], scene: Scene, colours: Palette) -> list[bool]:
    seen, (item,) = read(image, colours), scene.objects
    asked = {"background": scene.background, **vars(item)}
    return [getattr(seen, name) == asked[name] for name in PROPERTIES]


def reader_accuracy(n: int, size: int, seed: int) -> dict[str, float]:
    """``accuracy`` on ``n`` real renderings of held-out scenes, ``size`` pixels."""
    rng = np.random.default_rng(seed)
    scenes = [scene for _, scene in held_out_prompts(n, seed)]
    return accuracy(np.stack([render(scene, size, rng) for scene in scenes]), scenes)


def load_samples(folder: Path) -> tuple[NDArray[np.uint8], list[str]]:
    """PNG files with a prompt, in the order of their names: images (N, size, size, 3) uint8 and prompts.

    A prompt is the file's text entry "prompt", or else its entry in ``prompts.json`` beside it, a list with one prompt
    for each PNG in the order of names. Other PNG files (such as a grid) are skipped. Raises ValueError if no file is
    left or the sizes differ.
    """
    if not folder.is_dir():
        raise ValueError(f"--images {folder}: no such folder")
    files = sorted(folder.glob("*.png"))
    listed = _listed_prompts(folder / "prompts.json", len(files))
    images: list[NDArray[np.uint8]] = []
    prompts: list[str] = []
    for file, default in zip(files, listed, strict=True):
        with Image.open(file) as image:
            prompt = getattr(image, "text", {}).get("prompt", default)
            if prompt is None:
                continue
        try:
            images.append(decode_whole(file.read_bytes()))
        except SampleError as error:
            raise ValueError(f"{file}: {error}") from None
        prompts.append(prompt)
    if not images:
        raise ValueError(
            f"--images {folder}: none of {len(files)} PNG files has a text entry 'prompt', and there is no prompts.json"
        )
    shapes = sorted({image.shape[:2] for image in images})
    if len(shapes) > 1 or shapes[0][0] != shapes[0][1]:
        raise ValueError(f"--images {folder}: expected square images of one size, found height x width {shapes}")
    return np.stack(images), prompts


def _listed_prompts(file: Path, expected: int) -> Sequence[str | None]:
    if not file.exists():
        return [None] * expected
    prompts = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(prompts, list) or len(prompts) != expected or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"{file}: expected a list of {expected} prompts, one for each PNG in the order of names")
    return prompts


def evaluate(folder: Path, seed: int) -> dict[str, Any]:
    """Accuracy of a folder of samples and of the reader itself; prompts of other kinds are skipped and counted."""
    images, prompts = load_samples(folder)
    kept, scenes, skipped = [], [], []
    for index, prompt in enumerate(prompts):
        try:
            scenes.append(parse(prompt))
        except ValueError as error:
            skipped.append(str(error))
        else:
            kept.append(index)
    if not scenes:
        raise ValueError(f"--images {folder}: no prompt names one object; the first one is {skipped[0]}")
    size = images.shape[1]
    return {
        "samples": accuracy(images[kept], scenes),
        "renderings": reader_accuracy(max(500, len(scenes)), size, seed),
        "image_size": size,
        "skipped": len(skipped),
        "first_skipped": skipped[:5],
    }


def print_table(result: dict[str, Any]) -> None:
    samples, renderings = result["samples"], result["renderings"]
    table = Table(title=f"Prompt accuracy at {result['image_size']} px")
    for heading in ("property", "samples", "real renderings"):
        table.add_column(heading, justify="left" if heading == "property" else "right")
    for name in (*PROPERTIES, "all"):
        table.add_row(name, f"{samples[name]:.1%}", f"{renderings[name]:.1%}")
    table.add_row("images", str(samples["n"]), str(renderings["n"]))
    console = Console()
    console.print(table)
    if result["skipped"]:
        console.print(f"{result['skipped']} prompts skipped, the first: {result['first_skipped'][0]}", markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--images", type=Path, metavar="DIR", help="folder of PNG samples with their prompts")
    action.add_argument("--write-prompts", type=Path, metavar="FILE", help="write held-out prompts, one per line")
    parser.add_argument("--count", type=int, default=240, help="prompts to write (default: 240, each scene twice)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of prompts and renderings (default: 0)")
    parser.add_argument(
        "--out", type=Path, help="JSON file for the result (default: prompt_accuracy.json in the images' folder)"
    )
    args = parser.parse_args(argv)
    if args.write_prompts:
        if args.count < 1:
            raise ValueError(f"--count {args.count}: must be at least 1")
        lines = [prompt for prompt, _ in held_out_prompts(args.count, args.seed)]
        args.write_prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return 0
    result = evaluate(args.images, args.seed)
    print_table(result)
    out = args.out or args.images / "prompt_accuracy.json"
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
