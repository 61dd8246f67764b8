"""Sums up the numbers of several seeds: means, confidence intervals, and ratios to the same seed of another network."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from dico_t2i.config import load_config
from dico_t2i.models import count_macs, count_parameters
from dico_t2i.report.history import read_history
from dico_t2i.runs.log import json_lines

Row = dict[str, Any]


def training_numbers(run: Path) -> dict[str, float]:
    """The losses of a run's last validation, its images per second (the median of its reports), and its seconds.

    The seconds are those of training, without the time between its starts. Raises ValueError without a validation.
    """
    lines = list(json_lines(run / "metrics.jsonl"))
    validations, speeds = [line for line in lines if "val_loss" in line], [line.get("images_per_s") for line in lines]
    if not validations or not any(speeds):
        raise ValueError(f"{run}: it was never validated, or reported no speed; see validation.every and log.every")
    losses = {key: value for key, value in validations[-1].items() if key.startswith("val_loss")}
    speed = statistics.median(speed for speed in speeds if speed)
    return {**losses, "images_per_s": speed, "seconds": read_history(run).seconds}


def summary(file: Path, overrides: Sequence[str], seeds: Sequence[Mapping[str, float]]) -> Row:
    """A row: the size of the network, and each number of all seeds, with its mean and interval."""
    config = load_config(file, overrides)
    steps = sum(stage.train.duration.steps or 0 for stage in config.stage_configs)
    row: Row = {"config": str(file), "overrides": list(overrides), "steps": steps}
    row["parameters"] = count_parameters(config.model)
    row["macs"] = count_macs(config.model, (1, config.model.in_channels, config.latent_size, config.latent_size))
    for key in seeds[0]:
        values = [seed[key] for seed in seeds]
        row[key] = {"values": values, "mean": statistics.mean(values), "interval": interval(values)}
    return row


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean; 0 for a single value, which has none."""
    if len(values) < 2:
        return 0.0
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return float(quantile * statistics.stdev(values) / math.sqrt(len(values)))


def ratios(row: Row, first: Row, key: str) -> list[float]:
    """A number of each seed, divided by that of the first network with the same seed."""
    return [mine / other for mine, other in zip(row[key]["values"], first[key]["values"], strict=True)]


def sizes(row: Row) -> tuple[str, str, str, str]:
    """The name, the parameters and multiply-accumulates in millions, and the steps of a row, as text."""
    return Path(row["config"]).stem, f"{row['parameters'] / 1e6:.3f}", f"{row['macs'] / 1e6:.1f}", str(row["steps"])


def shown(number: Mapping[str, float], form: str) -> str:
    """The mean and the interval of a number as text, in a form such as ".2f"."""
    return f"{number['mean']:{form}} ± {number['interval']:{form}}"
