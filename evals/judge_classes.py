"""Judge pictures that a model has made of classes, such as those of CIFAR-10, beside real pictures and controls.

dico sample --checkpoint runs/cifar10_t2i --prompts prompts.txt --out samples
python evals/judge_classes.py --images samples --checkpoint runs/cifar10_t2i --train data/cifar10 \\
    --test data/cifar10_test --classifier weights/cifar10.safetensors --out judged.json

The classifier is one of evals/train_classifier.py; the class of a picture is the one that its prompt names. Printed are
the share of pictures that the classifier takes for their class, Frechet distances of its features from the training
split, whether pictures are copies of training pictures, and the loss on held-out data. Its features are not the FID
Inception's, so that these distances are not FIDs. --free judges pictures of prompts in words that were never trained.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from dico_t2i.command import positive, run, script_parser
from dico_t2i.files import write_atomically
from dico_t2i.sampling.images import make_grid
from evals.prompt_accuracy import load_samples
from evals.quality.distances import gaussian_of
from evals.quality.protocol import digest
from evals.real import judges
from evals.real.classifier import SIZE, Classifier, load_classifier
from evals.real.prompts import class_asked
from evals.real.results import write_results
from evals.real.shards import Images, read_images

NEIGHBOURS = 24  # pictures of the grid of nearest training pictures


def samples(folder: Path, names: Sequence[str]) -> tuple[Tensor, Tensor, list[str]]:
    """The pictures of a folder (N, 3, H, W) uint8, the classes (N,) that their prompts name, and the prompts."""
    images, prompts = load_samples(folder)
    asked = torch.tensor([class_asked(prompt, names) for prompt in prompts])
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), asked, prompts


def cached_features(classifier: Classifier, images: Images, folder: Path) -> tuple[Tensor, Tensor]:
    """The classes and features of a real split, which are kept in a folder."""
    from safetensors.torch import load_file, save

    file = folder / f"features-{digest([classifier.sha256, images.content, len(images.labels)])}.safetensors"
    if not file.exists():
        classes, features = classifier(images.images)
        write_atomically(file, save({"classes": classes, "features": features}))  # others may judge at the same time
    kept = load_file(file)
    return kept["classes"], kept["features"]


def judge(args: Any) -> tuple[list[judges.Verdict], dict[str, Any]]:
    """The verdicts, and the protocol: everything that they depend on beside the checkpoint."""
    classifier = load_classifier(args.classifier)
    train, test = (read_images(folder, SIZE) for folder in (args.train, args.test))
    (_, trained), (recognised, real) = (cached_features(classifier, s, args.classifier.parent) for s in (train, test))
    images, asked, prompts = samples(args.images, classifier.names)
    found, features = classifier(images)
    kept = torch.from_numpy(np.random.default_rng(0).permutation(len(train.labels))[: len(images)])
    pixels = train.images[:5000].float()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * pixels.std() + pixels.mean()
    accuracy = float((recognised == test.labels).double().mean())
    classes = train.class_names()
    verdicts = [
        judges.accuracy("pictures taken for their class", found, asked, accuracy),
        judges.frechet(features, real, gaussian_of(trained), classifier(noise.clamp(0, 255).to(torch.uint8))[1]),
        judges.frechet_by_class(
            (features, asked), (real, test.labels), judges.gaussians(trained, train.labels, len(classes))
        ),
        *judges.copies(features, real, classifier(train.images[kept].flip(-1))[1], trained),
    ]
    protocol = {
        "classifier": {"sha256": classifier.sha256, "test_accuracy": classifier.accuracy},
        "train": train.content,
        "test": test.content,
        "prompts": digest(prompts),
        "pictures": len(prompts),
    }
    if args.free:
        free, wanted, words = samples(args.free, classifier.names)
        name = "pictures of words never trained taken for their class"
        verdicts.insert(1, judges.accuracy(name, classifier(free)[0], wanted, accuracy))
        protocol["free_prompts"] = digest(words)
    if args.checkpoint:
        verdicts.append(held_out_loss(args))
        protocol["loss_samples"] = args.loss_samples
    draw_neighbours(images, train.images[judges.nearest(features, trained)[1]], args.out.with_suffix(".neighbours.png"))
    return verdicts, protocol


def held_out_loss(args: Any) -> judges.Verdict:
    """The loss of the checkpoint's averaged weights on held-out and on training samples."""
    from dico_t2i.sampling.pipeline import load_pipeline
    from evals.real.losses import judge_losses

    pipeline = load_pipeline(args.checkpoint, None, torch.device("cpu"), torch.float32)
    return judge_losses(pipeline, args.test, args.loss_samples)


def draw_neighbours(images: Tensor, neighbours: Tensor, path: Path) -> None:
    """Draw the first pictures, each beside the training picture that is nearest to it."""
    shown = list(zip(images, neighbours, strict=True))[:NEIGHBOURS]
    pairs = [torch.cat((image, _sized(other, image.shape[-1])), dim=-1) for image, other in shown]
    path.parent.mkdir(parents=True, exist_ok=True)
    make_grid(torch.stack(pairs), [""] * len(pairs)).save(path)


def _sized(image: Tensor, size: int) -> Tensor:
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="PNG samples with their prompts, or class numbers")
    add("--train", type=Path, required=True, metavar="DIR", help="image shards of the training split, with classes")
    add("--test", type=Path, required=True, metavar="DIR", help="image shards of the test split")
    add("--classifier", type=Path, required=True, metavar="FILE", help="file of evals/train_classifier.py")
    add("--free", type=Path, metavar="DIR", help="samples of prompts in words that were never trained")
    add("--checkpoint", type=Path, metavar="RUN", help="also measure the loss of this run")
    add("--loss-samples", type=positive, default=1024, help="samples for the loss (default: 1024)")
    add("--out", type=Path, required=True, metavar="FILE", help="JSON file for the verdicts")
    args = parser.parse_args(argv)
    verdicts, protocol = judge(args)
    write_results(args.out, str(args.images), protocol, verdicts)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
