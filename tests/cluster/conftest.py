"""A real SLURM for the tests, on this machine."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.sandbox import Sandbox, missing_programs
from tests.cluster.workplace import Workplace
from tests.forked_python import forked_python
from tests.training.conftest import shapes_data

__all__ = ["shapes_data"]


def started(folder: Path, **size: int) -> Sandbox:
    """A running sandbox. Skips the test where SLURM is not installed, but not in CI."""
    missing = missing_programs()
    if missing and "CI" not in os.environ:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: slurm-wlm and munge)")
    sandbox = Sandbox(folder, **size)
    sandbox.start()
    return sandbox


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """pytest's own are too deep for the paths of sockets."""
    with tempfile.TemporaryDirectory(prefix="dico-slurm-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def slurm(short_folder) -> Iterator[Sandbox]:
    """Two nodes; SLURM's commands find it."""
    sandbox = started(short_folder / "two")
    os.environ.update(sandbox.environment)
    yield sandbox
    sandbox.stop()


@pytest.fixture
def large_slurm(short_folder, monkeypatch) -> Iterator[Sandbox]:
    """Sixteen nodes of eight GPUs, for what is only asked, not run."""
    sandbox = started(short_folder / "sixteen", nodes=16, cpus=96, gpus=8)
    monkeypatch.setenv("SLURM_CONF", str(sandbox.conf))
    yield sandbox
    sandbox.stop()


@pytest.fixture(scope="session")
def quick_python(short_folder) -> Iterator[Path]:
    """A Python for the jobs that starts them as forks; test_sbatch_example.py and others start true ones."""
    with forked_python(short_folder / "bin") as folder:
        yield folder / "python"


@pytest.fixture
def workplace(tmp_path, shapes_data, quick_python) -> Workplace:
    return Workplace(tmp_path, shapes_data, quick_python)
