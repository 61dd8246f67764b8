"""Draw a captioned data set of coloured shapes.

python data_prep/shapes.py --out data/shapes --samples 20000 --size 16 --seed 0

Most images show one object; a share shows two. Every image has all its captions. One in eight combinations of colour,
shape and background is never drawn; evals/prompt_accuracy.py asks for those. Train with data.flip: false, because
captions mention left and right.
"""

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from data_prep.common import finished_or_absent, is_finished
from data_prep.shapes_scene import captions, random_scene, render
from dico_t2i.command import progress_bar, run, script_parser
from dico_t2i.data.writer import ShardWriter


def make_sample(index: int, *, size: int, seed: int, two_objects: float, held_out: bool) -> dict[str, Any]:
    """Sample number ``index``, which depends on the arguments alone: key, PNG bytes and captions."""
    rng = np.random.default_rng([seed, index])
    scene = random_scene(rng, two_objects, held_out)
    png = io.BytesIO()
    Image.fromarray(render(scene, size, rng)).save(png, "PNG")
    return {
        "__key__": f"{index:08d}",
        "png": png.getvalue(),
        "json": {"captions": captions(scene), "width": size, "height": size},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of shards to make")
    parser.add_argument("--samples", type=int, required=True, metavar="N", help="number of images")
    parser.add_argument("--size", type=int, choices=(16, 32, 64), default=16, help="pixels (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and jitter (default: 0)")
    parser.add_argument(
        "--two-objects",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="share of images with two objects (default: 0.25)",
    )
    parser.add_argument("--held-out", action="store_true", help="draw only the combinations kept out of training")
    parser.add_argument("--samples-per-shard", type=int, default=5000, metavar="N", help="(default: 5000)")
    args = parser.parse_args(argv)
    if args.samples < 1 or args.samples_per_shard < 1 or args.seed < 0 or not 0 <= args.two_objects <= 1:
        raise ValueError("--samples and --samples-per-shard: at least 1, --seed: at least 0, --two-objects: 0 to 1")

    recipe = {name: getattr(args, name) for name in ("size", "seed", "two_objects", "held_out")}
    meta = {"source": "shapes", "samples": args.samples, **recipe}
    if is_finished(args.out, meta):
        print(f"{args.out}: it already contains these {args.samples} images")
        return 0
    with (
        finished_or_absent(args.out) as folder,
        ShardWriter(folder, kind="images", meta=meta, samples_per_shard=args.samples_per_shard) as writer,
        progress_bar() as progress,
    ):
        for index in progress.track(range(args.samples), description="shapes"):
            writer.write(make_sample(index, **recipe))
    print(f"{args.out}: {args.samples} images of {args.size} px")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
