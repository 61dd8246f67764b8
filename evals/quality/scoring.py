"""From the features of two sets of images to a protocol's numbers."""

from collections.abc import Sequence

import numpy as np

from evals.quality import distances
from evals.quality.distances import FrechetTo
from evals.quality.extractors import CLIP, DINO, LOGITS, POOL, POOL_DIMENSION, SPATIAL
from evals.quality.feature_sets import FeatureSet
from evals.quality.protocol import Metric, Scoring

Numbers = dict[str, float]

_ENOUGH = 5 * POOL_DIMENSION  # samples for a line through FIDs of part of them: fewer bend it


def score(
    settings: Scoring, wanted: Sequence[Metric], generated: FeatureSet, reference: FeatureSet, resamples: int
) -> tuple[Numbers, Numbers]:
    """The numbers of the wanted metrics, and standard errors over ``resamples`` bootstrap samples of the generated.

    A bootstrapped FID is biased upwards, as FID of fewer samples is: its spread is used, not its mean.
    """
    numbers: Numbers = {}
    errors: Numbers = {}
    if "fid" in wanted:
        _add_fid(numbers, errors, generated, reference, resamples)
    if "sfid" in wanted:
        numbers["sfid"] = distances.frechet_distance(generated.gaussians[SPATIAL], reference.gaussians[SPATIAL])
    if "fd_dinov2" in wanted:
        numbers["fd_dinov2"] = distances.frechet_distance(generated.gaussians[DINO], reference.gaussians[DINO])
    if "is" in wanted:
        logits = generated.rows[LOGITS]
        numbers["is"], numbers["is_std"] = distances.inception_score(logits, settings.splits)
        if resamples:
            errors["is"] = distances.bootstrap(
                len(logits), resamples, lambda chosen: distances.inception_score(logits[chosen], settings.splits)[0]
            )
    if {"precision", "recall"} & set(wanted):
        both = distances.precision_recall(generated.rows[POOL], reference.rows[POOL], settings.neighbours)
        numbers |= {name: value for name, value in zip(("precision", "recall"), both, strict=True) if name in wanted}
    if "kid" in wanted:
        numbers["kid"], numbers["kid_std"] = distances.kid(
            generated.rows[POOL], reference.rows[POOL], settings.kid_subsets, settings.kid_subset_size
        )
    if "clip" in wanted:
        scores = generated.rows[CLIP].double()
        numbers["clip"] = float(scores.mean())
        errors["clip"] = float(scores.std() / len(scores) ** 0.5)
    return numbers, errors


def _add_fid(numbers: Numbers, errors: Numbers, generated: FeatureSet, reference: FeatureSet, resamples: int) -> None:
    to = FrechetTo(reference.gaussians[POOL])
    numbers["fid"] = to.gaussian(generated.gaussians[POOL])
    features = generated.rows[POOL]
    if len(features) > POOL_DIMENSION:  # below, the product of covariances is singular, and its root inexact
        numbers["fid_cleanfid"] = cleanfid_distance(features.cpu().numpy(), reference)
    if len(features) >= _ENOUGH:
        numbers["fid_infinity"] = distances.frechet_infinity(to, features, len(features) // 4)
    if resamples:
        features, projected = to.projected(features)
        errors["fid"] = distances.bootstrap(
            len(features), resamples, lambda chosen: to.sample(features[chosen], projected[chosen])
        )


def cleanfid_distance(features: np.ndarray, reference: FeatureSet) -> float:
    """FID by clean-fid's functions, from the same features (N, 2048) and the reference's statistics."""
    from cleanfid.fid import frechet_distance

    features = features.astype(np.float64)
    mean, cov = features.mean(axis=0), np.cov(features, rowvar=False)
    target = reference.gaussians[POOL]
    return float(frechet_distance(mean, cov, target.mean.cpu().numpy(), target.cov.cpu().numpy()))


def warnings(samples: int, reference: FeatureSet) -> list[str]:
    """What makes a number less than it seems, to be told before anything is generated."""
    said = []
    if 0 < reference.n <= POOL_DIMENSION:
        said.append(
            f"{reference.n} reference images for features of dimension {POOL_DIMENSION}: their covariance is singular,"
            " and FID is far from that of the population"
        )
    if samples <= POOL_DIMENSION:
        said.append(f"{samples} samples for features of dimension {POOL_DIMENSION}: FID is biased far upwards")
    return said


def check_metrics(
    settings: Scoring, wanted: Sequence[Metric], samples: int, outputs: set[str], reference: FeatureSet
) -> None:
    """Raises ValueError for a metric without its features, or of too few samples, saying what to do."""
    if "is" in wanted and samples < settings.splits:
        raise ValueError(f"--metrics is: {samples} samples cannot be cut into {settings.splits} parts; leave it out")
    of_one_container: dict[Metric, str] = {"sfid": SPATIAL, "is": LOGITS}
    for metric, name in of_one_container.items():
        if metric in wanted and name not in outputs:
            raise ValueError(
                f"--metrics {metric}: this extractor gives {', '.join(sorted(outputs))} only; leave it out"
            )
    statistics: dict[Metric, str] = {"fid": POOL, "sfid": SPATIAL, "fd_dinov2": DINO}
    for metric, name in statistics.items():
        if metric in wanted and name not in reference.gaussians:
            raise ValueError(
                f"--metrics {metric}: the reference has no {name} statistics; leave it out, or give images"
            )
    if {"precision", "recall", "kid"} & set(wanted) and POOL not in reference.rows:
        raise ValueError(
            "--metrics precision, recall, kid: the reference has statistics only, no images; leave them out"
        )
    fewest = min(samples, len(reference.rows.get(POOL, ())))
    if {"precision", "recall"} & set(wanted) and fewest <= settings.neighbours:
        raise ValueError(f"--metrics precision, recall: {fewest} images have no {settings.neighbours} neighbours each")
