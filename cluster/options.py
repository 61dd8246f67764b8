"""The command-line options that all launching scripts share."""

import argparse
import os
from pathlib import Path

from dico_t2i.command import non_negative, positive
from dico_t2i.config import ClusterConfig, read_cluster
from dico_t2i.text_lines import check_text

_PROFILE_VARIABLE = "DICO_CLUSTER"


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """--cluster FILE and one option for each key of it that changes often."""
    group = parser.add_argument_group("cluster", "each overrides a key of the profile")
    add = group.add_argument
    add("--cluster", type=Path, metavar="FILE", help=f"a profile, see configs/cluster/ (default: ${_PROFILE_VARIABLE})")
    add("--nodes", type=positive, help="how many nodes")
    add("--gpus-per-node", type=non_negative, help="0 trains on CPUs")
    add("--tasks-per-node", type=positive, help="processes per node, where there are no GPUs")
    add("--cpus-per-task", type=positive, help="CPU cores of each process")
    add("--mem", help="of a node, such as 400G; 0 is all")
    add("--partition", help="the queue, as sinfo lists them (default: the site's)")
    add("--account", help="whose share of the cluster is charged, as sbatch understands it")
    add("--qos", help="quality of service, as sbatch understands it")
    add("--constraint", help="features that nodes must have: h100, or 'h100|h200'")
    add("--time", help="limit: minutes, H:M:S or days-H:M:S")
    add("--exclusive", action="store_const", const=True, help="share the nodes with no other job")
    add("--container", help="an image for srun --container-image")
    add("--signal-lead", type=positive, dest="signal_lead_s", metavar="S", help="seconds before the limit to save")
    add("--max-requeues", type=non_negative, help="times a job may come back after stops and failures")
    add("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch")
    add("--local", action="store_true", help="here, without SLURM")


def chosen_cluster(arguments: argparse.Namespace, below: ClusterConfig | None = None) -> ClusterConfig:
    """The profile, under the keys that a config's own section sets, under the options given. Raises ConfigError."""
    profile = arguments.cluster or (Path(os.environ[_PROFILE_VARIABLE]) if _PROFILE_VARIABLE in os.environ else None)
    changes = {key: value for key in ClusterConfig.model_fields if (value := getattr(arguments, key, None)) is not None}
    changes.pop("sbatch", None)
    cluster = read_cluster(profile, changes, below)
    if not arguments.sbatch:
        return cluster
    return read_cluster(None, {"sbatch": {**cluster.sbatch, **_pairs(arguments.sbatch)}}, cluster)


def _pairs(texts: list[str]) -> dict[str, str | bool]:
    """Each value is text as typed; an option without one is True."""
    pairs: dict[str, str | bool] = {}
    for text in texts:
        key, equals, value = check_text(text, "--sbatch").partition("=")
        if not key:
            raise ValueError(f"--sbatch {text!r}: expected KEY=VALUE, such as reservation=lab")
        pairs[key.lstrip("-")] = value if equals else True
    return pairs
