"""The command-line options that all launching scripts share."""

import argparse
import os
from pathlib import Path

from dico_t2i.command import non_negative, positive
from dico_t2i.config import ClusterConfig, read_cluster
from dico_t2i.text_lines import check_text

_PROFILE_VARIABLE = "DICO_CLUSTER"


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add --cluster FILE, and one option for each key of a profile that often changes."""
    group = parser.add_argument_group("cluster", "each option replaces a key of the profile")
    add = group.add_argument
    add("--cluster", type=Path, metavar="FILE", help=f"a profile, see configs/cluster/ (default: ${_PROFILE_VARIABLE})")
    add("--nodes", type=positive, help="number of nodes")
    add("--gpus-per-node", type=non_negative, help="GPUs of each node; 0 trains on CPUs")
    add("--tasks-per-node", type=positive, help="processes per node without GPUs")
    add("--cpus-per-task", type=positive, help="CPU cores of each process")
    add("--mem", help="memory of each node, such as 400G; 0 is all")
    add("--partition", help="the partition, as listed by sinfo (default: the site's)")
    add("--account", help="the account that is charged, as for sbatch")
    add("--qos", help="the quality of service, as for sbatch")
    add("--constraint", help="features that nodes must have: h100, or 'h100|h200'")
    add("--time", help="time limit: minutes, H:M:S or days-H:M:S")
    add("--exclusive", action="store_const", const=True, help="share the nodes with no other job")
    add("--container", help="an image for srun --container-image")
    add("--signal-lead", type=positive, dest="signal_lead_s", metavar="S", help="save S seconds before the limit")
    add("--max-requeues", type=non_negative, help="how often a job is requeued after stops and failures")
    add("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch; repeatable")
    add("--local", action="store_true", help="run on this machine, without SLURM")


def chosen_cluster(arguments: argparse.Namespace, below: ClusterConfig | None = None) -> ClusterConfig:
    """The profile, replaced by keys that a config's own section sets, replaced by options. Raises ConfigError."""
    profile = arguments.cluster or (Path(os.environ[_PROFILE_VARIABLE]) if _PROFILE_VARIABLE in os.environ else None)
    changes = {key: value for key in ClusterConfig.model_fields if (value := getattr(arguments, key, None)) is not None}
    changes.pop("sbatch", None)
    cluster = read_cluster(profile, changes, below)
    if not arguments.sbatch:
        return cluster
    return read_cluster(None, {"sbatch": {**cluster.sbatch, **_pairs(arguments.sbatch)}}, cluster)


def _pairs(texts: list[str]) -> dict[str, str | bool]:
    """KEY=VALUE texts as a dictionary of texts; a KEY without a value is True."""
    pairs: dict[str, str | bool] = {}
    for text in texts:
        key, equals, value = check_text(text, "--sbatch").partition("=")
        if not key:
            raise ValueError(f"--sbatch {text!r}: expected KEY=VALUE, such as reservation=lab")
        pairs[key.lstrip("-")] = value if equals else True
    return pairs
