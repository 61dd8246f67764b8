"""Distances between sets of features: pure functions on tensors, computed in float64 if the features are float64.

Sources: Frechet distance of Gaussians, Dowson and Landau 1982, and FID, Heusel et al. 2017; Inception Score, Salimans
et al. 2016; KID, Binkowski et al. 2018; improved precision and recall, Kynkaanniemi et al. 2019; FID extrapolated to
infinitely many samples, Chong and Forsyth 2020.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dico_t2i import randomness

_BLOCK = 4096  # rows of features whose distances are in memory together


class Gaussian(NamedTuple):
    """mean (D,) and unbiased covariance (D, D), float64."""

    mean: Tensor
    cov: Tensor


class Moments:
    """The mean and covariance of a stream of features, float64, by the pairwise update of Chan et al. 1979.

    The last bits depend on the order and the sizes of the parts that are added.
    """

    def __init__(self, dimension: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Add features (N, D)."""
        if not len(features):
            return
        features = features.to(self.mean.device).double()
        n, mean = len(features), features.mean(dim=0)
        centred, shift, total = features - mean, mean - self.mean, self.n + len(features)
        self._scatter += centred.T @ centred + torch.outer(shift, shift) * (self.n * n / total)
        self.mean = self.mean + shift * (n / total)
        self.n = total

    def gaussian(self) -> Gaussian:
        """The Gaussian of all features that were added."""
        return Gaussian(self.mean, self._scatter / (self.n - 1))


class FrechetTo:
    """Squared Frechet distance to one Gaussian: |m1 - m2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)).

    tr sqrt(S1 S2) is the sum of the square roots of the eigenvalues of R S1 R, where R is the symmetric root of S2, or
    with few samples of those of the smaller Gram matrix.
    """

    def __init__(self, target: Gaussian) -> None:
        self.mean, self.trace = target.mean, target.cov.trace()
        values, vectors = torch.linalg.eigh(target.cov)
        self.root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def gaussian(self, source: Gaussian) -> float:
        """The distance from a Gaussian."""
        return self._distance(source.mean, source.cov.trace(), self.root @ source.cov @ self.root)

    def projected(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The arguments of ``sample``: features (N, D) and their product with the root; take the same rows of both."""
        return features.double(), features.double() @ self.root

    def sample(self, features: Tensor, projected: Tensor) -> float:
        """The distance from features, given as rows of the results of ``projected``."""
        n, mean = len(features), features.mean(dim=0)
        centred = (projected - projected.mean(dim=0)) / (n - 1) ** 0.5
        gram = centred @ centred.T if n < features.shape[1] else centred.T @ centred
        trace = (features - mean).square().sum() / (n - 1)
        return self._distance(mean, trace, gram)

    def _distance(self, mean: Tensor, trace: Tensor, product: Tensor) -> float:
        roots = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt()
        return float((mean - self.mean).square().sum() + trace + self.trace - 2 * roots.sum())


def gaussian_of(features: Tensor) -> Gaussian:
    """The Gaussian of features (N, D), computed at once."""
    moments = Moments(features.shape[1], features.device)
    moments.add(features)
    return moments.gaussian()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance; it is the FID if the Gaussians are of the FID Inception's features."""
    return FrechetTo(b).gaussian(a)


def cleanfid_distance(features: Tensor, target: Gaussian) -> float:
    """Squared Frechet distance by clean-fid's functions, from features (N, D)."""
    from cleanfid.fid import frechet_distance

    rows = features.cpu().numpy().astype(np.float64)
    mean, cov = rows.mean(axis=0), np.cov(rows, rowvar=False)
    return float(frechet_distance(mean, cov, target.mean.cpu().numpy(), target.cov.cpu().numpy()))


def frechet_infinity(to: FrechetTo, features: Tensor, smallest: int, points: int = 8) -> float:
    """The distance for infinitely many samples: a line through the distances of n samples, as a function of 1 / n.

    features (N, D). n goes from ``smallest`` to N, evenly spaced in 1 / n; the samples are the first n of one fixed
    shuffle.
    """
    features, projected = to.projected(features)
    order = torch.from_numpy(randomness.permutation(0, "frechet infinity", 0, len(features)))
    inverse = torch.linspace(1 / smallest, 1 / len(features), points, dtype=torch.float64)
    sizes = [round(float(1 / x)) for x in inverse]
    distances = [to.sample(features[order[:n]], projected[order[:n]]) for n in sizes]
    line = torch.stack((torch.ones(points, dtype=torch.float64), 1 / torch.tensor(sizes, dtype=torch.float64)), dim=1)
    return float(torch.linalg.lstsq(line, torch.tensor(distances, dtype=torch.float64)[:, None]).solution[0, 0])


def inception_score(logits: Tensor, splits: int) -> tuple[float, float]:
    """Mean and standard deviation over ``splits`` consecutive parts of exp(E KL(p(y|x) || p(y))). logits (N, K)."""
    log_p = logits.double().log_softmax(dim=1)
    scores = torch.stack([_split_score(part) for part in log_p.tensor_split(splits)])
    return float(scores.mean()), float(scores.std(correction=0))


def _split_score(log_p: Tensor) -> Tensor:
    p = log_p.exp()
    return (p * (log_p - p.mean(dim=0).log())).sum(dim=1).mean().exp()


def precision_recall(generated: Tensor, real: Tensor, neighbours: int) -> tuple[float, float]:
    """The share of generated features within the real manifold, and of real features within the generated manifold.

    The manifold of a set is the union of balls around its members that reach their ``neighbours``-th nearest other
    member. generated (N, D), real (M, D).
    """
    return _covered(generated, real, neighbours), _covered(real, generated, neighbours)


def _covered(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    radii = torch.cat([d.kthvalue(neighbours + 1, dim=1).values for d in _distances(manifold, manifold)])
    return float(torch.cat([(d <= radii).any(dim=1) for d in _distances(points, manifold)]).double().mean())


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    b = b.double()
    for block in a.split(_BLOCK):
        yield torch.cdist(block.double(), b)


def kid(generated: Tensor, real: Tensor, subsets: int, size: int, seed: int = 0) -> tuple[float, float]:
    """Unbiased squared MMD with the kernel (x y / D + 1)^3: mean and standard deviation over subsets.

    generated (N, D), real (M, D). A subset has ``size`` of each, but at most N and M, drawn by the seed.
    """
    size = min(size, len(generated), len(real))
    values = torch.tensor(
        [
            _mmd(_subset(generated, size, seed, f"kid generated {k}"), _subset(real, size, seed, f"kid real {k}"))
            for k in range(subsets)
        ],
        dtype=torch.float64,
    )
    return float(values.mean()), float(values.std(correction=0))


def _subset(features: Tensor, size: int, seed: int, purpose: str) -> Tensor:
    chosen = torch.from_numpy(randomness.permutation(seed, purpose, 0, len(features))[:size])
    return features[chosen.to(features.device)].double()


def _mmd(x: Tensor, y: Tensor) -> float:
    n, dimension = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dimension + 1) ** 3

    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
    return float(within / (n * (n - 1)) - 2 * xy.mean())


def bootstrap(n: int, times: int, statistic: Callable[[Tensor], float], seed: int = 0) -> float:
    """The standard deviation of a statistic over ``times`` draws of n indices with replacement."""
    values = [statistic(randomness.integers(seed, f"bootstrap {k}", torch.arange(n), n)) for k in range(times)]
    return float(torch.tensor(values, dtype=torch.float64).std())
