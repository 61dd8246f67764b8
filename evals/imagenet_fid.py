"""FID and other metrics of a class-conditional model on ImageNet, under a protocol.

    python evals/imagenet_fid.py --checkpoint runs/NAME --reference VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc-per-node 8 evals/imagenet_fid.py --checkpoint runs/NAME --reference imagenet/train

The class of image i is a uniform draw of Philox for (prompts.seed, "evaluation class", i). ADM's reference batch has
statistics of the training images, and 10,000 images for precision and recall. Everything else is as in
evals/coco_fid.py.
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
    made.add_argument("--reference", type=Path, required=True, help="ADM's npz, or a folder of images")
    add_protocol_options(made, "imagenet50k-adm")
    return made


def prepare(args: argparse.Namespace, protocol: Protocol) -> "Evaluation":
    """Do everything that precedes the first sample: checks, and the features of the reference; collective."""
    weights = find_weights(protocol.extractor, args.extractor, args.cache) if needs_inception(args.metrics) else None
    if protocol.prompts.rule != "uniform":
        raise ValueError(f"--protocol {protocol.name}: it has captions, not classes; use it with evals/coco_fid.py")
    import torch

    from dico_t2i import randomness
    from evals.quality.evaluation import Evaluation
    from evals.quality.protocol import digest

    reference = protocol.reference
    index = torch.arange(protocol.prompts.count)
    labels = randomness.integers(protocol.prompts.seed, "evaluation class", index, protocol.prompts.classes or 1)

    return Evaluation(
        args,
        protocol,
        labels.tolist(),
        {"drawn_sha256": digest(labels.tolist())},
        weights,
        lambda cache: cache.of_path(
            args.reference, protocol.extractor, reference.crop, protocol.image_size, reference.manifold
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    protocol = chosen_protocol(args)
    prepare(args, protocol).run(protocol)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
