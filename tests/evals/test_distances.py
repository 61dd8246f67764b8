"""Metrics against closed forms, constructed sets, torch-fidelity and clean-fid on the same features."""

import math

import numpy as np
import pytest
import torch
from cleanfid.fid import fid_from_feats
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from evals.quality import distances
from evals.quality.distances import FrechetTo, Gaussian, Moments, frechet_distance, gaussian_of


def features(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Correlated, of unequal spread."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(9), dtype=torch.float64) / d**0.5
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + shift


@pytest.mark.parametrize(("smallest", "tolerance"), [(1e-3, 1e-12), (0.0, 1e-7)])
def test_frechet_distance_of_commuting_gaussians_has_a_closed_form(smallest: float, tolerance: float) -> None:
    """With a common eigenbasis it is |m1 - m2|^2 + sum (sqrt(a_i) - sqrt(b_i))^2.

    The root of a rounding error of 1e-16 is 1e-8: singular covariances cost digits.
    """
    basis = torch.linalg.qr(features(6, 6, 0)).Q
    a, b = torch.tensor([9.0, 4, 1, 0.25, 16, smallest]), torch.tensor([1.0, 4, 9, 1, smallest, smallest])
    a, b = a.double(), b.double()
    m = torch.arange(6).double()
    first, second = (Gaussian(mean, basis @ torch.diag(values) @ basis.T) for mean, values in ((m, a), (0 * m, b)))
    expected = float(m.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(first, second) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("n", "tolerance"), [(40, 1e-6), (400, 1e-10)])
def test_frechet_distance_of_samples_by_either_gram_matrix(n: int, tolerance: float) -> None:
    real, mine = features(500, 64, 1), features(n, 64, 2, 0.1)
    to = FrechetTo(gaussian_of(real))
    assert to.sample(*to.projected(mine)) == pytest.approx(
        frechet_distance(gaussian_of(mine), gaussian_of(real)), rel=tolerance
    )


def test_frechet_distance_equals_clean_fids() -> None:
    real, mine = features(300, 64, 1), features(400, 64, 2, 0.1)
    assert frechet_distance(gaussian_of(mine), gaussian_of(real)) == pytest.approx(
        fid_from_feats(mine.numpy(), real.numpy()), rel=1e-9
    )


def test_moments_of_a_stream_are_those_of_the_whole() -> None:
    x = features(1000, 16, 3, 1e4)  # far from 0: where raw sums of squares cancel
    stream = Moments(16)
    for part in x.split(77):
        stream.add(part)
    assert stream.n == 1000
    np.testing.assert_allclose(stream.gaussian().mean, x.mean(dim=0), rtol=1e-12)
    np.testing.assert_allclose(stream.gaussian().cov, np.cov(x.numpy(), rowvar=False), rtol=1e-9, atol=1e-9)


def test_extrapolation_removes_the_bias_of_few_samples() -> None:
    """FID_n is FID + b / n to first order; of the same distribution FID is 0."""
    to = FrechetTo(Gaussian(torch.zeros(8).double(), torch.eye(8).double()))
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    biased = to.sample(*to.projected(x[:200]))
    assert abs(distances.frechet_infinity(to, x, 200)) < 0.1 * biased


def test_inception_score_of_known_answers() -> None:
    certain = torch.eye(10).repeat(20, 1) * 1e3
    assert distances.inception_score(certain, 2)[0] == pytest.approx(10, rel=1e-12)
    assert distances.inception_score(torch.zeros(50, 10), 5) == pytest.approx((1, 0))


def test_inception_score_equals_torch_fidelitys() -> None:
    logits = 2 * features(500, 50, 4)
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    mean, spread = distances.inception_score(logits, 10)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
    assert spread == pytest.approx(theirs["inception_score_std"], rel=1e-8)


def test_kid_of_whole_sets_equals_torch_fidelitys() -> None:
    real, mine = features(200, 32, 1), features(200, 32, 2, 0.3)
    theirs = kid_features_to_metric(mine, real, kid_subsets=1, kid_subset_size=200, rng_seed=0, verbose=False)
    assert distances.kid(mine, real, 1, 200)[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)


def test_kid_is_unbiased() -> None:
    """Its mean over subsets of one distribution is 0 within its standard error; the biased one is far from it."""
    mean, spread = distances.kid(features(3000, 16, 1), features(3000, 16, 2), 200, 50)
    assert abs(mean) < 4 * spread / math.sqrt(60)


def test_precision_and_recall_equal_torch_fidelitys() -> None:
    real, mine = features(400, 8, 1), features(300, 8, 2, 0.5)
    theirs = prc_features_to_metric(
        mine.float(), real.float(), prc_neighborhood=3, prc_batch_size=10000, verbose=False, rng_seed=0
    )
    precision, recall = distances.precision_recall(mine, real, 3)
    assert 0.1 < recall < precision or 0.1 < precision < recall
    assert precision == pytest.approx(theirs["precision"], abs=1e-6)
    assert recall == pytest.approx(theirs["recall"], abs=1e-6)


def test_precision_and_recall_of_constructed_sets() -> None:
    """Two far clusters, one of which is generated, with as many strays: half of either is covered."""
    grid = torch.stack(torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij"), -1).reshape(-1, 2)
    real = torch.cat((grid, grid + 1000))
    generated = torch.cat((grid + 0.1, grid * 0.01 - 5000))
    assert distances.precision_recall(generated, real, 3) == (0.5, 0.5)
    assert distances.precision_recall(real, real, 3) == (1, 1)


def test_distances_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    real, mine = features(200, 8, 1), features(150, 8, 2, 0.5)
    whole = distances.precision_recall(mine, real, 3)
    monkeypatch.setattr(distances, "_BLOCK", 37)
    assert distances.precision_recall(mine, real, 3) == whole


def test_bootstrap_gives_the_standard_error_of_a_mean() -> None:
    x = features(1000, 1, 5)[:, 0]
    error = distances.bootstrap(1000, 200, lambda chosen: float(x[chosen].mean()))
    assert error == pytest.approx(float(x.std()) / 1000**0.5, rel=0.15)
