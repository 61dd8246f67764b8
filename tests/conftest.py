"""Lets tests import the scripts of cluster/, data_prep/ and evals/, which are not installed; and deals them out."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

PLACE_AMONG_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LONGEST_FIRST = ("cluster", "faults", "training", "test_plan.py", "test_tutorial.py", "evals")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that side by side (pytest -n, file by file) all end at about the same time."""
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.relative_to(TESTS).parts[0], len(rank)))


@pytest.fixture(autouse=True)
def no_place_among_ranks() -> Iterator[None]:
    """A test that trained in this process leaves no place among ranks to the programs that later ones start."""
    yield
    for name in PLACE_AMONG_RANKS:
        os.environ.pop(name, None)
