"""Data for the runs, and runs that were left alone to compare with."""

from collections.abc import Callable
from pathlib import Path

import pytest

from .harness import Run, write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("faults") / "data")


@pytest.fixture
def new_run(tmp_path, data) -> Callable[..., Run]:
    """Make a run from overrides of the config."""
    return lambda *overrides: Run(tmp_path, data, "run", *overrides)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory, data) -> Callable[..., Run]:
    """A run that was left alone, of these overrides and ranks; made once."""
    done: dict[tuple, Run] = {}

    def make(*overrides: str, ranks: int = 2) -> Run:
        if (overrides, ranks) not in done:
            run = Run(tmp_path_factory.mktemp("whole"), data, "run", *overrides)
            run.train(ranks=ranks)
            done[overrides, ranks] = run
        return done[overrides, ranks]

    return make
