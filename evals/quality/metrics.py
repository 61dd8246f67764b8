"""The metrics, one row each: protocols, command lines, checks and reports read this table.

To add a metric, write its function here, put a new formula into distances.py, and add a row to METRICS. Nothing heavy
is imported before a metric is computed, so that wrong options are reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from evals.quality.features import CLIP, DINO, FEATURES, LOGITS, POOL, POOL_DIMENSION, SPATIAL

if TYPE_CHECKING:
    from evals.quality.feature_sets import FeatureSet
    from evals.quality.protocol import Scoring

_ENOUGH = 5 * POOL_DIMENSION  # fewest samples for fitting a line to FIDs; with fewer they do not lie on one

Numbers = dict[str, float]


@dataclass(frozen=True)
class Sets:
    """The inputs of metrics. resamples: bootstrap samples for standard errors; 0 for none."""

    generated: FeatureSet
    reference: FeatureSet
    settings: Scoring
    resamples: int


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    label: for tables and plots.
    feature: the kind of features that it compares; it decides which network is loaded.
    reference: what it needs of the reference set: mean and covariance, the features of its images, or nothing.
    compute: returns the numbers and their standard errors, by name. A number NAME_std is the spread of NAME over parts.
    too_few: returns what is wrong with these numbers of samples and reference images; None if nothing is.
    also: labels of further numbers that ``compute`` returns.
    """

    label: str
    feature: str
    reference: Literal["statistics", "images", None]
    compute: Callable[[Sets], tuple[Numbers, Numbers]]
    too_few: Callable[[Scoring, int, int], str | None] = lambda settings, samples, images: None
    also: Mapping[str, str] = field(default_factory=dict)


def _fid(sets: Sets) -> tuple[Numbers, Numbers]:
    """FID. A bootstrapped FID is biased upwards, like the FID of fewer samples, so only its spread is used."""
    from evals.quality import distances

    target, features = sets.reference.gaussians[POOL], sets.generated.rows[POOL]
    to = distances.FrechetTo(target)
    numbers = {"fid": to.gaussian(sets.generated.gaussians[POOL])}
    if len(features) > POOL_DIMENSION:  # otherwise the product of covariances is singular and its root inexact
        numbers["fid_cleanfid"] = distances.cleanfid_distance(features, target)
    if len(features) >= _ENOUGH:
        numbers["fid_infinity"] = distances.frechet_infinity(to, features, len(features) // 4)
    if not sets.resamples:
        return numbers, {}
    features, projected = to.projected(features)
    error = distances.bootstrap(
        len(features), sets.resamples, lambda chosen: to.sample(features[chosen], projected[chosen])
    )
    return numbers, {"fid": error}


def _frechet(name: str, feature: str) -> Callable[[Sets], tuple[Numbers, Numbers]]:
    """A function for the Frechet distance of other features."""

    def compute(sets: Sets) -> tuple[Numbers, Numbers]:
        from evals.quality import distances

        mine, target = sets.generated.gaussians[feature], sets.reference.gaussians[feature]
        return {name: distances.frechet_distance(mine, target)}, {}

    return compute


def _inception_score(sets: Sets) -> tuple[Numbers, Numbers]:
    from evals.quality import distances

    logits, splits = sets.generated.rows[LOGITS], sets.settings.splits
    score, spread = distances.inception_score(logits, splits)
    numbers = {"is": score, "is_std": spread}
    if not sets.resamples:
        return numbers, {}
    error = distances.bootstrap(
        len(logits), sets.resamples, lambda chosen: distances.inception_score(logits[chosen], splits)[0]
    )
    return numbers, {"is": error}


def _no_parts(settings: Scoring, samples: int, images: int) -> str | None:
    if samples >= settings.splits:
        return None
    return f"is: {samples} samples cannot be divided into {settings.splits} parts; leave this metric out"


def _precision_recall(sets: Sets) -> tuple[Numbers, Numbers]:
    """Precision and recall together, because they share the distances."""
    from evals.quality import distances

    rows = sets.generated.rows[POOL], sets.reference.rows[POOL]
    precision, recall = distances.precision_recall(*rows, sets.settings.neighbours)
    return {"precision": precision, "recall": recall}, {}


def _no_neighbours(settings: Scoring, samples: int, images: int) -> str | None:
    if (fewest := min(samples, images)) > settings.neighbours:
        return None
    return f"precision, recall: {fewest} images have fewer than {settings.neighbours} neighbours each"


def _kid(sets: Sets) -> tuple[Numbers, Numbers]:
    from evals.quality import distances

    rows, settings = (sets.generated.rows[POOL], sets.reference.rows[POOL]), sets.settings
    value, spread = distances.kid(*rows, settings.kid_subsets, settings.kid_subset_size)
    return {"kid": value, "kid_std": spread}, {}


def _clip(sets: Sets) -> tuple[Numbers, Numbers]:
    scores = sets.generated.rows[CLIP].double()
    return {"clip": float(scores.mean())}, {"clip": float(scores.std() / len(scores) ** 0.5)}


_MORE_FID = {"fid_cleanfid": "FID by clean-fid's functions", "fid_infinity": "FID extrapolated to infinity"}

METRICS: dict[str, Metric] = {
    "fid": Metric("FID", POOL, "statistics", _fid, also=_MORE_FID),
    "sfid": Metric("sFID", SPATIAL, "statistics", _frechet("sfid", SPATIAL)),
    "is": Metric("Inception Score", LOGITS, None, _inception_score, _no_parts),
    "precision": Metric("precision", POOL, "images", _precision_recall, _no_neighbours),
    "recall": Metric("recall", POOL, "images", _precision_recall, _no_neighbours),
    "kid": Metric("KID", POOL, "images", _kid),
    "clip": Metric("CLIP score", CLIP, None, _clip),
    "fd_dinov2": Metric("FD-DINOv2", DINO, "statistics", _frechet("fd_dinov2", DINO)),
}

# The labels of all numbers that a result may contain, in the order of the tables.
LABELS = {key: label for name, row in METRICS.items() for key, label in ((name, row.label), *row.also.items())}


def networks_of(metrics: Iterable[str]) -> set[str]:
    """The networks that compute the features of these metrics."""
    return {FEATURES[METRICS[name].feature].network for name in metrics}
