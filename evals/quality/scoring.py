"""Computes a protocol's numbers from the features of two sets of images."""

from collections.abc import Sequence

from evals.quality.feature_sets import FeatureSet
from evals.quality.features import FEATURES, INCEPTION, POOL_DIMENSION
from evals.quality.metrics import METRICS, Numbers, Sets
from evals.quality.protocol import Scoring


def score(
    settings: Scoring, wanted: Sequence[str], generated: FeatureSet, reference: FeatureSet, resamples: int
) -> tuple[Numbers, Numbers]:
    """The numbers of the wanted metrics, and standard errors over ``resamples`` bootstrap samples of the generated."""
    sets = Sets(generated, reference, settings, resamples)
    numbers: Numbers = {}
    errors: Numbers = {}
    for compute in dict.fromkeys(row.compute for name, row in METRICS.items() if name in wanted):
        more_numbers, more_errors = compute(sets)
        numbers |= more_numbers
        errors |= more_errors
    return {name: value for name, value in numbers.items() if name in wanted or name not in METRICS}, errors


def warnings(samples: int, reference: FeatureSet) -> list[str]:
    """Warnings about unreliable numbers, to be printed before anything is generated."""
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
    settings: Scoring, wanted: Sequence[str], samples: int, outputs: set[str], reference: FeatureSet
) -> None:
    """Raise ValueError that says what to do, for a metric without its features or with too few samples."""
    for name in wanted:
        row = METRICS[name]
        if FEATURES[row.feature].network == INCEPTION and row.feature not in outputs:
            raise ValueError(f"--metrics {name}: this extractor only gives {', '.join(sorted(outputs))}; leave it out")
        if row.reference == "statistics" and row.feature not in reference.gaussians:
            raise ValueError(
                f"--metrics {name}: the reference has no {row.feature} statistics; leave it out, or give images"
            )
        if row.reference == "images" and row.feature not in reference.rows:
            alike = ", ".join(other for other, metric in METRICS.items() if metric.reference == "images")
            raise ValueError(f"--metrics {alike}: the reference has statistics only, no images; leave them out")
        if reason := row.too_few(settings, samples, len(reference.rows.get(row.feature, ()))):
            raise ValueError(f"--metrics {reason}")
