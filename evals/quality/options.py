"""The options that the evaluation scripts share. Imports nothing heavy."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from dico_t2i.command import non_negative, place, positive
from evals.quality import weights
from evals.quality.features import INCEPTION, Models
from evals.quality.metrics import METRICS, networks_of
from evals.quality.protocol import Protocol, load_protocol, names


def add_protocol_options(parser: argparse.ArgumentParser, protocol: str | None = None) -> None:
    """Add the options that choose a protocol and change it."""
    add = parser.add_argument
    add("--protocol", default=protocol, required=protocol is None, help=f"one of {', '.join(names())}")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a change, which makes the result not comparable",
    )
    add("--metrics", type=metric_names, metavar="A,B", help="only compute these metrics of the protocol")
    add_network_options(parser)


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for weights, the cache, and the computation of statistics."""
    add = parser.add_argument
    add("--extractor", type=Path, help=f"weights of the FID Inception (default: in the cache), or {weights.SEEDED}")
    for name, model in Models.model_fields.items():
        add(f"--{name}", help=f"folder of {model.description} (default: the protocol's, from the hub's cache)")
    add(
        "--cache",
        type=Path,
        default=weights.CACHE,
        help=f"folder of weights and reference statistics (default: {weights.CACHE})",
    )
    add(
        "--resamples",
        type=non_negative,
        default=20,
        help="bootstrap samples for standard errors; 0: none (default: 20)",
    )
    add("--threads", type=positive, default=1, help="CPU threads of a rank, which may change last bits (default: 1)")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the checkpoint and the results."""
    add = parser.add_argument
    add("--checkpoint", type=place, required=True, help="a run, one of its checkpoints, or an export")
    add("--out", type=Path, help="folder of results (default: evals/ in the run's folder)")
    add("--save", choices=("png", "npz"), help="also keep the images, as PNGs or one npz in ADM's layout")


def chosen_protocol(args: argparse.Namespace) -> Protocol:
    """The protocol with its changes. Raises ConfigError, or ValueError for a metric that the protocol does not have."""
    fix_threads(args.threads)
    protocol = load_protocol(args.protocol, args.set)
    metrics = protocol.scoring.metrics
    unknown = set(args.metrics or ()) - set(metrics)
    if unknown:
        raise ValueError(
            f"--metrics {','.join(sorted(unknown))}: not in {protocol.name} ({', '.join(metrics)}); to add one,"
            " with a result that is not comparable: --set scoring.metrics=[...]"
        )
    args.metrics = args.metrics or metrics
    return protocol


def needs_inception(metrics: Sequence[str]) -> bool:
    """Whether any of them compares features of the FID Inception."""
    return INCEPTION in networks_of(metrics)


def fix_threads(threads: int) -> None:
    """Set the threads of libraries that read it at their first import: more threads may change a sum's last bits."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)


def metric_names(text: str) -> tuple[str, ...]:
    """The metrics of a comma-separated list."""
    unknown = set(text.split(",")) - METRICS.keys()
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(METRICS)}")
    return tuple(text.split(","))
