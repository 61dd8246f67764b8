"""Judge pictures of concepts in styles that were never trained together, such as emoji in two drawing styles.

dico sample --checkpoint runs/emoji_t2i --prompts prompts.txt --out samples
python evals/judge_emoji.py --images samples --data data/emoji --held-out data/emoji_held_out \\
    --checkpoint runs/emoji_t2i --out judged.json

A picture shows its concept if, among all concepts in the other style, its own is the nearest, or is among the ten
nearest; it shows its style if a linear classifier of the trained pictures says so. Both compare
colours and edges of pixels (evals/real/spaces.py) for a model of latents, and the latents of --autoencoder for a model
of pixels, because a model is never judged in the space that it was trained in. Real pictures of the held-out pairs are
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
from evals.real.spaces import pixel_features

SIZE = 64
CONCEPT, STYLE = "code", "style"
RIDGE = 1e-2  # of the style's classifier, by the mean variance of a feature

Space = Callable[[Tensor], Tensor]


def latent_space(path: str) -> Space:
    """The posterior means of a tiny autoencoder."""
    autoencoder = load_autoencoder(AutoencoderConfig(kind="tiny", path=path), "cpu")
    return lambda images: torch.cat([autoencoder.mean_latents(part).flatten(1) for part in images.split(64)])


def judge_pairs(
    space: Space, generated: Tensor, asked: Sequence[int], held: Images, known: Images
) -> list[judges.Verdict]:
    """The verdicts on pictures (N, 3, H, W) uint8 of the held-out samples with the numbers ``asked``."""
    gallery, queries = space(torch.cat((known.images, held.images))), space(generated)
    about, mean = [*known.about, *held.about], gallery.mean(dim=0)
    gallery, queries = gallery - mean, queries - mean
    real = gallery[len(known.about) :][torch.tensor(asked)]
    styles = sorted({entry[STYLE] for entry in about})
    wanted = torch.tensor([styles.index(held.about[number][STYLE]) for number in asked])
    found = [torch.zeros(len(asked), dtype=torch.int64) for _ in range(3)]  # ranks; 0: nothing to compare with
    sizes = []
    for style, name in enumerate(styles):
        others = [number for number, entry in enumerate(about) if entry[STYLE] != name]
        place = {about[number][CONCEPT]: row for row, number in enumerate(others)}
        mine = [n for n, s in enumerate(asked) if wanted[n] == style and held.about[s][CONCEPT] in place]
        if not mine:
            continue
        answers = torch.tensor([place[held.about[asked[number]][CONCEPT]] for number in mine])
        rows, chosen, mixed = gallery[others], torch.tensor(mine), answers[judges.shuffled(len(answers))]
        pairs = (queries[chosen], answers), (real[chosen], answers), (queries[chosen], mixed)
        for ranks, (features, row) in zip(found, pairs, strict=True):
            ranks[chosen] = judges.ranks(features, rows, row)
        sizes.append(len(others))
    if not sizes:
        raise ValueError("--held-out: none of its concepts has a picture in another style in --data")
    kept = found[0] > 0
    trained = torch.tensor([styles.index(entry[STYLE]) for entry in known.about])
    style_of = linear_classifier(gallery[: len(trained)], trained, len(styles))
    of_real = float((style_of(real) == wanted)[kept].double().mean())
    as_asked = judges.accuracy("style as asked", style_of(queries)[kept], wanted[kept], of_real)
    generated_ranks, real_ranks, control_ranks = (ranks[kept] for ranks in found)
    return [*judges.retrieval(generated_ranks, real_ranks, control_ranks, max(sizes)), as_asked]


def linear_classifier(features: Tensor, classes: Tensor, count: int) -> Callable[[Tensor], Tensor]:
    """A linear classifier of features (N, D), fitted to classes (N,) by ridge regression: features to classes (M,)."""
    x = torch.cat((features, torch.ones(len(features), 1)), dim=1).double()
    penalty = RIDGE * float(features.var(dim=0).mean()) * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(x.T @ x + penalty, x.T @ F.one_hot(classes, count).double())
    return lambda rows: (rows.double() @ weight[:-1] + weight[-1]).argmax(dim=1)


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
    space = latent_space(args.autoencoder) if pixels else pixel_features
    known, held = (read_images(folder, SIZE) for folder in (args.data, args.held_out))
    images, prompts = load_samples(args.images)
    generated = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    verdicts = judge_pairs(space, generated, numbers_asked(prompts, held), held, known)
    samples = min(args.loss_samples, len(held.labels))
    protocol = {
        "space": f"latents of {Path(args.autoencoder).name}" if pixels else "colours and edges of pixels",
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
