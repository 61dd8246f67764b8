"""Train the classifier that judges generated images, on the real training split of a set with classes.

python evals/train_classifier.py --train data/cifar10 --test data/cifar10_test --out weights/cifar10.safetensors

A small residual network, stochastic gradient descent with a one-cycle learning rate, random crops and mirror images.
The file holds the weights, the names of the classes and the accuracy on the test split. After each epoch the state is
saved beside it; started again, the command resumes there, with the same result.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from dico_t2i import randomness
from dico_t2i.command import positive, progress_bar, run, script_parser
from dico_t2i.files import temporary
from evals.real.classifier import SIZE, Network, normalised, recognise, save_classifier
from evals.real.shards import Images, read_images

BATCH, PAD = 256, 4
PEAK_LR, MOMENTUM, DECAY, SMOOTHING = 0.2, 0.9, 5e-4, 0.1
RISE = 0.25  # share of the training in which the learning rate rises


@dataclass(frozen=True)
class Plan:
    """epochs: passes over the training split. bf16: autocast. steps: at most so many steps, to try it out."""

    epochs: int
    width: int
    seed: int
    bf16: bool = False
    steps: int | None = None


class Training:
    """The network and its optimizer, and how far they have come."""

    def __init__(self, train: Images, plan: Plan, state: Path) -> None:
        self.train, self.plan, self.state, self.epoch = train, plan, state, 0
        pixels = train.images[:10_000].float() / 255
        self.mean, self.deviation = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
        torch.manual_seed(plan.seed)
        self.network = Network(len(train.class_names()), plan.width)
        self.network.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), PEAK_LR, MOMENTUM, weight_decay=DECAY, nesterov=True
        )
        if state.exists():
            self._load(torch.load(state, weights_only=True))

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train.images) // BATCH

    @property
    def options(self) -> list[int]:
        """What a saved state must have been begun with."""
        return [self.plan.epochs, self.plan.width, self.plan.seed, self.plan.bf16]

    def run_epoch(self, advance: Any) -> float:
        """Train one epoch, and save the state. Returns the mean loss."""
        self.network.train()
        order = torch.from_numpy(
            randomness.permutation(self.plan.seed, "classifier", self.epoch, len(self.train.images))
        )
        first, losses = self.epoch * self.steps_per_epoch, list[float]()
        for number in range(self.steps_per_epoch):
            if self.plan.steps is not None and first + number >= self.plan.steps:
                break
            losses.append(self._step(order[number * BATCH : (number + 1) * BATCH], first + number))
            advance()
        self.epoch += 1
        part = temporary(self.state)
        content = {"epoch": self.epoch, "plan": self.options}
        torch.save({**content, "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}, part)
        part.replace(self.state)
        return sum(losses) / len(losses)

    def _step(self, chosen: Tensor, step: int) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = PEAK_LR * one_cycle((step + 1) / (self.plan.epochs * self.steps_per_epoch))
        mirrored = alternately_mirrored(chosen, self.plan.seed, self.epoch)
        images = augmented(self.train.images[chosen], mirrored, self.plan.seed, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.plan.bf16):
            logits = self.network(normalised(images, self.mean, self.deviation))
        loss = F.cross_entropy(logits.float(), self.train.labels[chosen], label_smoothing=SMOOTHING)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def _load(self, content: dict[str, Any]) -> None:
        if content["plan"] != self.options:
            raise ValueError(f"{self.state}: it was begun with other options; delete it, or choose a different --out")
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.epoch = int(content["epoch"])

    @torch.no_grad()
    def accuracy(self, test: Images) -> float:
        """The share of test images whose class is recognised."""
        self.network.eval()
        chunks = zip(test.images.split(BATCH), test.labels.split(BATCH), strict=True)
        right = 0
        for images, labels in chunks:
            classes, _ = recognise(self.network, normalised(images, self.mean, self.deviation))
            right += int((classes == labels).sum())
        return right / len(test.labels)


def one_cycle(done: float) -> float:
    """The share of the peak learning rate at a share of the training: up, then down to 0, both linear."""
    return done / RISE if done < RISE else (1 - done) / (1 - RISE)


def alternately_mirrored(images: Tensor, seed: int, epoch: int) -> Tensor:
    """Which images (N,), given by their numbers, are mirrored in an epoch: each in every second one.

    So two epochs show both sides of every image, of which independent draws would repeat one in half of the cases
    (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU").
    """
    return (randomness.integers(seed, "mirror", images, 2) + epoch) % 2 == 1


def augmented(images: Tensor, mirrored: Tensor, seed: int, step: int) -> Tensor:
    """Each image (N, 3, H, W) uint8 moved by up to PAD pixels, with reflected edges, and mirrored if asked (N,)."""
    count, size = len(images), images.shape[-1]
    position = torch.arange(count) + step * count
    moved = randomness.integers(seed, "crop", position, (2 * PAD + 1) ** 2)
    padded = F.pad(images.float(), (PAD,) * 4, mode="reflect").to(torch.uint8)
    rows, columns = (offset[:, None] + torch.arange(size) for offset in (moved // (2 * PAD + 1), moved % (2 * PAD + 1)))
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    return padded[
        torch.arange(count)[:, None, None, None],
        torch.arange(3)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def train_classifier(train: Images, test: Images, plan: Plan, out: Path) -> float:
    """Train, or resume, and write the classifier. Returns its accuracy on the test split."""
    out.parent.mkdir(parents=True, exist_ok=True)
    training = Training(train, plan, out.with_suffix(".state"))
    total = min(plan.epochs * training.steps_per_epoch, plan.steps or 1 << 60)
    with progress_bar() as progress:
        task = progress.add_task("steps", total=total, completed=training.epoch * training.steps_per_epoch)
        while training.epoch < plan.epochs and training.epoch * training.steps_per_epoch < total:
            loss = training.run_epoch(lambda: progress.advance(task))
            print(f"epoch {training.epoch} of {plan.epochs}: loss {loss:.3f}", flush=True)
    accuracy = training.accuracy(test)
    save_classifier(out, training.network, training.mean, training.deviation, train.class_names(), accuracy)
    return accuracy


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--train", type=Path, required=True, metavar="DIR", help="shards of the training split, with classes")
    add("--test", type=Path, required=True, metavar="DIR", help="shards of the test split")
    add("--out", type=Path, required=True, metavar="FILE", help="the classifier, a .safetensors file")
    add("--epochs", type=positive, default=24, help="passes over the training split (default: 24)")
    add("--width", type=positive, default=40, help="channels of the first layer (default: 40)")
    add("--seed", type=int, default=0, help="seed of all random draws (default: 0)")
    add(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="bf16: half the time on CPUs with AMX or AVX-512 in bf16 (default: fp32)",
    )
    add("--steps", type=positive, help="stop after so many steps, to try it out")
    args = parser.parse_args(argv)
    train, test = read_images(args.train, SIZE), read_images(args.test, SIZE)
    plan = Plan(args.epochs, args.width, args.seed, args.precision == "bf16", args.steps)
    accuracy = train_classifier(train, test, plan, args.out)
    print(f"{args.out}: {accuracy:.2%} of {len(test.labels)} test images")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
