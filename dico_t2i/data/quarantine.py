"""Reads the list of samples to leave out, ``quarantine.jsonl`` beside the shards; data_prep/verify.py writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dico_t2i.text_lines import read_lines

FILE = "quarantine.jsonl"

Quarantine = Mapping[int, frozenset[str] | None]  # shard -> keys; None is the whole shard


def read_quarantine(folder: Path, names: Sequence[str]) -> Quarantine:
    """The quarantine of a folder of shards; empty without the file. Shards that are not in the index are ignored.

    Each line is ``{"shard": name, "key": key or null for the whole shard, "reason": text}``. Raises ValueError with
    the number and content of a line that has a different form.
    """
    path = folder / FILE
    try:
        lines = read_lines(path)
    except FileNotFoundError:
        return {}
    entries = [_entry(line, f"{path}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    numbers = {name: number for number, name in enumerate(names)} if entries else {}
    found: dict[int, set[str] | None] = {}
    for shard, key in entries:
        if shard not in numbers:
            continue
        if key is None:
            found[numbers[shard]] = None
        elif (keys := found.setdefault(numbers[shard], set())) is not None:
            keys.add(key)
    return {shard: None if keys is None else frozenset(keys) for shard, keys in found.items()}


def quarantined_samples(quarantine: Quarantine, samples: np.ndarray) -> int:
    """The number of samples in quarantine; ``samples`` are the numbers of samples of all shards."""
    return sum(int(samples[shard]) if keys is None else len(keys) for shard, keys in quarantine.items())


def _entry(line: str, where: str) -> tuple[str, str | None]:
    try:
        entry = json.loads(line)
        shard, key = entry["shard"], entry["key"]
    except (ValueError, TypeError, KeyError, RecursionError):
        shard = key = 0
    if not isinstance(shard, str) or not isinstance(key, str | None):
        raise ValueError(
            f'{where}: expected {{"shard": name, "key": key or null, "reason": text}}, found {line[:100]!r}'
        )
    return shard, key
