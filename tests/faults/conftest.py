"""Data for the runs, and runs that were left alone to compare with."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import latents
from tests.small_models import save_autoencoder

from .harness import Run, write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("faults") / "data")


@pytest.fixture(scope="session")
def cached_latents(tmp_path_factory) -> tuple[str, ...]:
    """The overrides to train on latents, encoded by a small autoencoder."""
    folder = tmp_path_factory.mktemp("latents")
    images = write_data(folder / "images", samples=32, size=32)
    autoencoder = str(save_autoencoder(folder / "autoencoder"))
    paths = ["--data", str(images), "--out", str(folder / "latents"), "--autoencoder", autoencoder]
    assert latents.main([*paths, "--size", "32", "--device", "cpu"]) == 0
    data = (f"data.path={folder / 'latents'}", "data.image_size=32")
    return (*data, "model.in_channels=4", "autoencoder.kind=kl", f"autoencoder.path={autoencoder}")


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
