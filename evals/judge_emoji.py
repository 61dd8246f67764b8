"""Judge pictures of concepts in styles that were never trained together, such as emoji in two drawing styles.

dico sample --checkpoint runs/emoji_t2i --prompts prompts.txt --out samples
python evals/judge_emoji.py --images samples --data data/emoji --held-out data/emoji_held_out \\
    --checkpoint runs/emoji_t2i --out judged.json

A picture is right if, among all concepts in the other style, its own concept is the nearest, or is among the ten
nearest. Nearness is the cosine of pixels for a model of latents, and of the latents of --autoencoder for a model of
pixels, because a model is never judged in the space that it was trained in. Real pictures of the held-out pairs are
measured in the same way, and as a control the pictures with the prompts of others.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from dico_t2i.command import positive, run, script_parser
from dico_t2i.config import AutoencoderConfig
from dico_t2i.encoders import load_autoencoder
from dico_t2i.sampling.pipeline import load_pipeline
from evals.prompt_accuracy import load_samples
from evals.quality.protocol import digest
from evals.real import judges
from evals.real.losses import judge_losses
from evals.real.results import write_results
from evals.real.shards import Images, read_images

SIZE, GRID = 64, 16
CONCEPT, STYLE = "code", "style"

Space = Callable[[Tensor], Tensor]


def pixel_space(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) uint8 as GRID x GRID pixels, less white: (N, D)."""
    return (F.adaptive_avg_pool2d(images.float() / 255, GRID) - 1).flatten(1)


def latent_space(path: str) -> Space:
    """The posterior means of a tiny autoencoder."""
    autoencoder = load_autoencoder(AutoencoderConfig(kind="tiny", path=path), "cpu")
    return lambda images: torch.cat([autoencoder.mean_latents(part).flatten(1) for part in images.split(64)])


def find_ranks(
    space: Space, generated: Tensor, asked: Sequence[int], held: Images, known: Images
) -> list[judges.Verdict]:
    """The verdicts on pictures (N, 3, H, W) uint8 of the held-out samples with the numbers ``asked``."""
    gallery, queries, real = space(torch.cat((known.images, held.images))), space(generated), space(held.images)
    about, mean = [*known.about, *held.about], gallery.mean(dim=0)
    gallery, queries, real = gallery - mean, queries - mean, real - mean
    ranks: tuple[list[Tensor], ...] = ([], [], [])
    sizes = []
    for style in sorted({entry[STYLE] for entry in held.about}):
        others = [number for number, entry in enumerate(about) if entry[STYLE] != style]
        place = {about[number][CONCEPT]: row for row, number in enumerate(others)}
        mine = [n for n, s in enumerate(asked) if held.about[s][STYLE] == style and held.about[s][CONCEPT] in place]
        if not mine:
            continue
        answers = torch.tensor([place[held.about[asked[number]][CONCEPT]] for number in mine])
        rows, chosen = gallery[others], torch.tensor(mine)
        mixed = answers[judges.shuffled(len(answers))]
        pairs = (queries[chosen], answers), (real[torch.tensor(asked)[chosen]], answers), (queries[chosen], mixed)
        for found, (features, wanted) in zip(ranks, pairs, strict=True):
            found.append(judges.ranks(features, rows, wanted))
        sizes.append(len(others))
    if not sizes:
        raise ValueError("--held-out: none of its concepts has a picture in another style in --data")
    generated_ranks, real_ranks, control_ranks = (torch.cat(found) for found in ranks)
    return judges.retrieval(generated_ranks, real_ranks, control_ranks, max(sizes))


def numbers_asked(prompts: Sequence[str], held: Images) -> list[int]:
    """The number of the held-out sample that each prompt captions. Raises ValueError for a prompt of none."""
    place = {caption: number for number, entry in enumerate(held.about) for caption in entry["captions"]}
    unknown = next((prompt for prompt in prompts if prompt not in place), None)
    if unknown is not None:
        raise ValueError(f"--images: the prompt {unknown!r} is no caption of --held-out")
    return [place[prompt] for prompt in prompts]


def judge(args: Any) -> tuple[list[judges.Verdict], dict[str, Any]]:
    """The verdicts, and the protocol: everything that they depend on beside the checkpoint."""
    pipeline = load_pipeline(args.checkpoint, None, torch.device("cpu"), torch.float32)
    pixels = pipeline.config.autoencoder.kind == "pixels"
    if pixels and not args.autoencoder:
        raise ValueError("--autoencoder: a model of pixels is judged by latents; give a folder, such as taef2's")
    space = latent_space(args.autoencoder) if pixels else pixel_space
    known, held = (read_images(folder, SIZE) for folder in (args.data, args.held_out))
    images, prompts = load_samples(args.images)
    generated = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    verdicts = find_ranks(space, generated, numbers_asked(prompts, held), held, known)
    samples = min(args.loss_samples, len(held.labels))
    protocol = {
        "space": f"latents of {Path(args.autoencoder).name}" if pixels else f"pixels {GRID}x{GRID}",
        "data": known.content,
        "held_out": held.content,
        "prompts": digest(prompts),
        "pictures": len(prompts),
        "loss_samples": samples,
    }
    return [*verdicts, judge_losses(pipeline, args.held_out, samples)], protocol


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="PNG samples with their prompts")
    add("--data", type=Path, required=True, metavar="DIR", help="image shards of the pairs that were trained")
    add("--held-out", type=Path, required=True, metavar="DIR", help="image shards of the held-out pairs")
    add("--checkpoint", type=Path, required=True, metavar="RUN", help="the run that made the pictures")
    add("--autoencoder", metavar="DIR", help="tiny autoencoder whose latents are compared, for a model of pixels")
    add("--loss-samples", type=positive, default=512, help="samples for the loss (default: 512)")
    add("--out", type=Path, required=True, metavar="FILE", help="JSON file for the verdicts")
    args = parser.parse_args(argv)
    verdicts, protocol = judge(args)
    write_results(args.out, str(args.images), protocol, verdicts)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
