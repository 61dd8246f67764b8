"""FID and other metrics of a text-to-image model on MS-COCO, under a protocol.

    python evals/coco_fid.py --checkpoint runs/NAME --images coco/val2014 \\
        --captions coco/annotations/captions_val2014.json --protocol coco30k-zeroshot
    torchrun --nproc-per-node 8 evals/coco_fid.py ...

An interrupted evaluation resumes when it is started again, on any number of ranks. The results are written to
runs/NAME/evals/PROTOCOL/STEP.json, with the first images as a grid. docs/evaluation.md describes protocols and metrics.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from dico_t2i.command import run, script_parser
from evals.quality.options import add_protocol_options, add_sampling_options, chosen_protocol, needs_inception
from evals.quality.protocol import Protocol
from evals.quality.weights import find_weights

if TYPE_CHECKING:
    from evals.quality.evaluation import Evaluation


def parser() -> argparse.ArgumentParser:
    """The parser of its options, which evals/sweep.py uses, too."""
    made = script_parser(__doc__)
    add_sampling_options(made)
    made.add_argument("--images", type=Path, required=True, help="folder of the annotated images, or its parent")
    made.add_argument("--captions", type=Path, required=True, help="COCO's captions_*.json")
    add_protocol_options(made)
    return made


def prepare(args: argparse.Namespace, protocol: Protocol) -> "Evaluation":
    """Do everything that precedes the first sample: checks, and the features of the reference; collective."""
    weights = find_weights(protocol.extractor, args.extractor, args.cache) if needs_inception(args.metrics) else None
    if protocol.prompts.rule == "uniform":
        raise ValueError(f"--protocol {protocol.name}: it has classes, not captions; use it with evals/imagenet_fid.py")
    from evals.quality.captions import draw, find_files
    from evals.quality.evaluation import Evaluation
    from evals.quality.images import ImageFiles

    drawn = draw(args.captions, protocol.prompts)
    names = drawn.files if protocol.reference.images == "drawn" else drawn.all_files
    images = ImageFiles(find_files(names, args.images), protocol.reference.crop, protocol.image_size)
    return Evaluation(
        args,
        protocol,
        drawn.captions,
        drawn.source,
        weights,
        lambda cache: cache.of(images, protocol.reference.manifold),
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    protocol = chosen_protocol(args)
    prepare(args, protocol).run(protocol)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
