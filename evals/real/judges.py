"""Judges of generated pictures. Each number has a 95 % interval, that of real pictures, and that of a control."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dico_t2i import randomness
from evals.quality.distances import FrechetTo, Gaussian, bootstrap, gaussian_of

_Z = 1.96
_BLOCK = 1000
_COPIES = 0.01  # the share of real test pictures that count as near to training


class Verdict(NamedTuple):
    """A number with its 95 % interval. real: of real pictures. control: of pictures that must fail."""

    name: str
    value: float
    interval: tuple[float, float]
    real: float | None
    control: float | None
    about: str


def share(right: Tensor) -> tuple[float, tuple[float, float]]:
    """The share of a bool tensor (N,), and its interval (Wilson 1927)."""
    n, p = len(right), float(right.double().mean())
    middle, width = p + _Z**2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    low, high = ((middle + side * width) / (1 + _Z**2 / n) for side in (-1, 1))
    return p, (max(low, 0.0), min(high, 1.0))


def accuracy(name: str, found: Tensor, asked: Tensor, real: float) -> Verdict:
    """The share of pictures taken for the class that was asked for, both (N,). real: the classifier's on real ones."""
    value, interval = share(found == asked)
    control = float((found == asked[shuffled(len(asked))]).double().mean())
    return Verdict(name, value, interval, real, control, "control: the same pictures with the prompts of others")


def shuffled(count: int) -> Tensor:
    """A fixed random order."""
    return torch.from_numpy(randomness.permutation(0, "control", 0, count))


def frechet(generated: Tensor, test: Tensor, train: Gaussian, noise: Tensor, resamples: int = 20) -> Verdict:
    """The Frechet distance of features (N, D) from those of the training split; real pictures are as many of ``test``.

    noise: the features of pictures of noise. The distance depends on N, so that it compares with the others only.
    """
    to = FrechetTo(train)
    value, error = _distance(to, generated, resamples)
    count = min(len(generated), len(test))
    real, control = (_distance(to, rows[:count], 0)[0] for rows in (test, noise))
    about = f"{len(generated)} pictures; control: noise with the mean and deviation of real pictures"
    return Verdict("Frechet distance", value, (value - _Z * error, value + _Z * error), real, control, about)


def frechet_by_class(
    generated: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], train: Sequence[Gaussian], resamples: int = 20
) -> Verdict:
    """The mean over classes of the Frechet distance within a class; each pair has features (N, D) and classes (N,).

    Its control are the same pictures with the prompts of others. Raises ValueError if a class has fewer than 2.
    """
    features, asked = generated
    tos = [FrechetTo(gaussian) for gaussian in train]
    smallest = min(int((asked == number).sum()) for number in range(len(train)))
    if smallest < 2:
        raise ValueError(f"the Frechet distance within classes needs 2 pictures of each, but one has {smallest}")
    parts = [_distance(to, features[asked == number], resamples) for number, to in enumerate(tos)]
    value = sum(distance for distance, _ in parts) / len(parts)
    error = math.sqrt(sum(error**2 for _, error in parts)) / len(parts)
    mixed = asked[shuffled(len(asked))]
    control = sum(_distance(to, features[mixed == number], 0)[0] for number, to in enumerate(tos)) / len(tos)
    counts = [int((asked == number).sum()) for number in range(len(tos))]
    same = [test[0][test[1] == number][:count] for number, count in enumerate(counts)]
    real = sum(_distance(to, rows, 0)[0] for to, rows in zip(tos, same, strict=True)) / len(tos)
    about = "mean over classes; control: the same pictures with the prompts of others"
    name = "Frechet distance within classes"
    return Verdict(name, value, (value - _Z * error, value + _Z * error), real, control, about)


def _distance(to: FrechetTo, rows: Tensor, resamples: int) -> tuple[float, float]:
    """The distance of features (N, D), and its standard error; 0 without resamples."""
    features, projected = to.projected(rows)
    draw: Callable[[Tensor], float] = lambda chosen: to.sample(features[chosen], projected[chosen])  # noqa: E731
    return to.sample(features, projected), bootstrap(len(rows), resamples, draw) if resamples else 0.0


def gaussians(features: Tensor, classes: Tensor, count: int) -> list[Gaussian]:
    """The Gaussian of the features (N, D) of each class."""
    return [gaussian_of(features[classes == number]) for number in range(count)]


def nearest(queries: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """The distance to, and the number of, each query's nearest neighbour: queries (N, D), gallery (M, D)."""
    found = [torch.cdist(block, gallery).min(dim=1) for block in queries.split(_BLOCK)]
    return torch.cat([values for values, _ in found]), torch.cat([numbers for _, numbers in found])


def copies(generated: Tensor, test: Tensor, near_copies: Tensor, train: Tensor) -> list[Verdict]:
    """Whether pictures are copies of training: their distance to the nearest training picture, in features (N, D).

    Compared with the distances of real test pictures; the control are mirrored training pictures, ``near_copies``.
    """
    mine, real, control = (nearest(rows, train)[0] for rows in (generated, test, near_copies))
    limit, median = torch.quantile(real, _COPIES), real.median()
    value, interval = share(mine <= limit)
    caught = float((control <= limit).double().mean())
    ratios = torch.sort(mine / median).values
    middle = float(ratios.median())
    half = _Z * math.sqrt(len(ratios)) / 2  # the ranks of the median's interval
    low, high = (int(min(max(len(ratios) / 2 + side * half, 0), len(ratios) - 1)) for side in (-1, 1))
    about = "nearer to training than 99 % of real test pictures are; control: mirrored training pictures"
    return [
        Verdict("near copies of training pictures", value, interval, _COPIES, caught, about),
        Verdict(
            "distance to the nearest training picture",
            middle,
            (float(ratios[low]), float(ratios[high])),
            1.0,
            float(control.median() / median),
            "median, by that of real test pictures; control: mirrored training pictures",
        ),
    ]


def ranks(queries: Tensor, gallery: Tensor, answers: Tensor) -> Tensor:
    """The rank, from 1, of each query's answer in the gallery, by cosine: (N, D), (M, D), (N,) numbers of rows."""
    similar = torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(gallery, dim=1).T
    own = similar.gather(1, answers[:, None])
    return (similar > own).sum(dim=1) + 1


def retrieval(generated: Tensor, real: Tensor, control: Tensor, size: int, most: int = 10) -> list[Verdict]:
    """How often pictures find their concept, drawn in another style, as the first and within the first ``most``.

    The ranks (N,) of generated and of real pictures of the same concepts, and of generated ones with the prompts of
    others. size: the number of concepts.
    """
    verdicts = []
    for limit in (1, most):
        value, interval = share(generated <= limit)
        whole, chance = (float((found <= limit).double().mean()) for found in (real, control))
        about = f"of {size} concepts, chance {limit / size:.2%}; control: the prompts of others"
        verdicts.append(Verdict(f"concept among the first {limit}", value, interval, whole, chance, about))
    return verdicts


def loss(own: Tensor, training: Tensor, other: Tensor) -> Verdict:
    """The mean loss on held-out samples (N,), on training samples, and on held-out ones with the captions of others."""
    mean, error = float(own.mean()), float(own.std() / len(own) ** 0.5)
    about = "real: the same on training pictures; control: held-out pictures with the captions of others"
    interval = (mean - _Z * error, mean + _Z * error)
    return Verdict("held-out loss", mean, interval, float(training.mean()), float(other.mean()), about)
