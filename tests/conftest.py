"""Lets tests import the scripts of cluster/, data_prep/ and evals/, which are not installed; and deals them out.

Tests with a short form take the fixture ``long``; ``pytest --long`` runs their long form.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
if "PYTEST_XDIST_WORKER" in os.environ:  # side by side, each has its share of the cores; before torch is imported
    share = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

PLACE_AMONG_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LONGEST_FIRST = (
    *(f"cluster/test_{name}.py" for name in ("stops", "launch", "chains", "sbatch_example")),
    *("faults/test_kills.py", "test_plan.py", "test_tutorial.py", "training/test_trainer.py", "faults/test_disk.py"),
    *("cluster", "faults", "training", "evals"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the long form of tests that have a short one")


@pytest.fixture(scope="session")
def long(pytestconfig: pytest.Config) -> bool:
    """Whether the long form is asked for."""
    return pytestconfig.getoption("long")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a file's tests together, and all that need SLURM: these mostly wait, and share one SLURM."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "tests/cluster" if file.startswith("tests/cluster/") else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest first, so that side by side (pytest -n) all end at about the same time.

    Cases with the marker ``long`` belong to the long form alone.
    """
    if not config.getoption("long"):
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}

    def place(item: pytest.Item) -> int:
        file = item.path.relative_to(TESTS)
        return rank.get(file.as_posix(), rank.get(file.parts[0], len(rank)))

    items.sort(key=place)


@pytest.fixture(autouse=True)
def no_place_among_ranks() -> Iterator[None]:
    """A test that trained in this process leaves no place among ranks to the programs that later ones start."""
    yield
    for name in PLACE_AMONG_RANKS:
        os.environ.pop(name, None)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python programs that the code under test starts are forks too."""
    from tests import forkserver

    monkeypatch.setattr(subprocess, "Popen", forkserver.Popen)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The ten files that took longest, where there are several."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.location[0]] += report.duration
    if len(seconds) > 1:
        terminalreporter.section("slowest files")
        for name, total in seconds.most_common(10):
            terminalreporter.line(f"{total:6.1f} s  {name}")
