"""Lets tests import the scripts of cluster/, data_prep/ and evals/, which are not installed; and deals them out."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

PLACE_AMONG_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LONGEST_FIRST = ("cluster", "faults", "training", "evals")


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Side by side (pytest -n), a file's tests stay together, and those on the one SLURM; the longest are first."""

    def folder(item: pytest.Item) -> str:
        return item.path.relative_to(TESTS).parts[0]

    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(folder(item), len(rank)))
    for item in items:
        group = "slurm" if folder(item) == "cluster" else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def no_place_among_ranks() -> Iterator[None]:
    """A test that trained in this process leaves no place among ranks to the programs that later ones start."""
    yield
    for name in PLACE_AMONG_RANKS:
        os.environ.pop(name, None)
