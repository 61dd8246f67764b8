"""Compare two sets of images: folders, or npz files in ADM's layout; the second may also be statistics.

    python evals/folder_fid.py samples/ reference/ --resize clean --metrics fid,kid,precision,recall
    python evals/folder_fid.py samples.npz VIRTUAL_imagenet256_labeled.npz --metrics fid,sfid,is

Images keep their own size and are decoded as a viewer shows them: turned as EXIF says, with transparent parts white.
All other files are counted. The CLIP score reads the text entry "prompt" of each PNG, which `dico sample` and --save
png write. Features are kept in the cache, so that a second comparison is fast.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from dico_t2i.command import run, script_parser
from evals.quality.features import LOGITS
from evals.quality.metrics import METRICS, networks_of
from evals.quality.options import add_network_options, fix_threads, metric_names, needs_inception
from evals.quality.protocol import STATE_DICT, TORCHSCRIPT, Extractor, Resize, Scoring, digest
from evals.quality.weights import Weights, find_weights

if TYPE_CHECKING:
    from evals.quality.evaluation import Networks

_CHUNK = 32


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("images", type=Path, help="folder or npz")
    parser.add_argument("reference", type=Path, help="folder, npz, or a statistics file of the cache")
    parser.add_argument(
        "--metrics", type=metric_names, default=("fid",), metavar="A,B", help="metrics to compute (default: fid)"
    )
    parser.add_argument(
        "--resize", choices=get_args(Resize), default="clean", help="resize to the extractor's input (default: clean)"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    add_network_options(parser)
    args = parser.parse_args(argv)
    fix_threads(args.threads)
    scripted = args.extractor and args.extractor.suffix == Path(TORCHSCRIPT).suffix
    extractor = Extractor(
        file=TORCHSCRIPT if scripted else STATE_DICT, sha256=None if scripted else "6726825d", resize=args.resize
    )
    weights = find_weights(extractor, args.extractor, args.cache) if needs_inception(args.metrics) else None
    result = _compare(args, extractor, weights)
    if result and args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _compare(args: argparse.Namespace, extractor: Extractor, weights: Weights | None) -> dict[str, Any] | None:
    """The result on rank 0, which prints it."""
    from evals.quality import results, scoring
    from evals.quality.evaluation import join, load_networks
    from evals.quality.feature_sets import FeatureSet
    from evals.quality.images import open_images
    from evals.quality.references import FeatureCache, unread_doubts

    settings = Scoring(metrics=args.metrics)
    images = open_images(args.images, "none")
    world = join(args.threads)
    networks = load_networks(extractor, settings, args, weights, world.device)
    cache = FeatureCache(args.cache, networks.images, world, _CHUNK)
    reference = FeatureSet(0, {})
    if any(METRICS[name].reference for name in args.metrics):
        reference = cache.of_path(args.reference, extractor)
    scoring.check_metrics(settings, args.metrics, len(images), networks.outputs, reference)
    for line in scoring.warnings(len(images), reference) if world.is_main and weights else []:
        print(f"warning: {line}", flush=True)
    generated = FeatureSet(len(images), {})
    if networks.images:
        generated = cache.of(images, logits=any(METRICS[name].feature == LOGITS for name in args.metrics))
    if networks.scorers:
        generated.rows |= _caption_scores(args, networks)
    if not world.is_main:
        return None
    numbers, errors = scoring.score(settings, args.metrics, generated, reference, args.resamples)
    doubts = [*networks.doubts, *reference.doubts, *unread_doubts(args.images, images)]
    result = {
        "subject": f"{args.images} against {args.reference}",
        "images": generated.n,
        "protocol": {"name": f"folders, {args.resize}", **settings.model_dump(mode="json")},
        "protocol_hash": digest([settings.model_dump(mode="json"), extractor.model_dump(mode="json"), _CHUNK]),
        "comparable": not doubts,
        "changes": [],
        "doubts": doubts,
        "numbers": numbers,
        "standard_errors": errors,
        "sources": {"images": generated.source, "reference": reference.source, "networks": networks.identities},
    }
    results.print_result(result)
    return result


def _caption_scores(args: argparse.Namespace, networks: "Networks") -> "dict[str, Any]":
    """The scores of PNGs that contain their prompts; every rank computes all of them."""
    import torch
    from PIL import Image

    from evals.quality.extractors import CAPTION_NETWORKS
    from evals.quality.images import ImageFiles, open_images

    images = open_images(args.images, "none")
    asked = f"--metrics {','.join(name for name in args.metrics if networks_of([name]) & CAPTION_NETWORKS.keys())}"
    if not isinstance(images, ImageFiles):
        raise ValueError(f"{asked}: {args.images} has no prompts; give a folder of PNGs that contain their prompts")
    prompts: list[str] = []
    for file in images.files:
        with Image.open(file) as image:
            prompts.append(getattr(image, "text", {}).get("prompt", ""))
    bare = [file.name for file, prompt in zip(images.files, prompts, strict=True) if not prompt]
    if bare:
        raise ValueError(f"{asked}: {len(bare)} of {len(prompts)} images have no text entry 'prompt': {bare[0]}")
    pieces = [range(i, min(i + _CHUNK, len(images))) for i in range(0, len(images), _CHUNK)]
    scores: dict[str, list[torch.Tensor]] = {}
    for piece in pieces:
        pixels, captions = images.read(piece), prompts[piece.start : piece.stop]
        for scorer in networks.scorers:
            for name, value in scorer(pixels, captions).items():
                scores.setdefault(name, []).append(value)
    return {name: torch.cat(parts) for name, parts in scores.items()}


if __name__ == "__main__":
    sys.exit(run(main))
