"""The names that the package gives to scripts and notebooks."""

import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console

import dico_t2i
from dico_t2i.command import shows_bars
from tests import forkserver
from tests.training.conftest import Runs, shapes_data

__all__ = ["shapes_data"]

FAST = """
import sys
import dico_t2i
assert dico_t2i.__version__
loaded = {"torch", "pydantic", "numpy", "dico_t2i.config"} & set(sys.modules)
assert not loaded, loaded
from dico_t2i import load_config
assert "torch" not in sys.modules
"""


def test_the_package_imports_nothing_until_a_name_is_used():
    subprocess.run([sys.executable, "-c", FAST], check=True)


def test_only_the_public_names_are_there():
    from dico_t2i import Pipeline, load_config
    from dico_t2i.config import load_config as original
    from dico_t2i.sampling.pipeline import Pipeline as OriginalPipeline

    assert load_config is original
    assert Pipeline is OriginalPipeline
    with pytest.raises(AttributeError, match="has no attribute 'Pipe'"):
        dico_t2i.Pipe  # noqa: B018
    with pytest.raises(ImportError, match="Pipe"):
        from dico_t2i import Pipe  # noqa: F401


TWICE = """
import signal
import sys
from dico_t2i import Pipeline, load_config, train

file, runs = sys.argv[1:]
numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
before = [signal.getsignal(number) for number in numbers]
for steps in (2, 4):
    run = train(load_config(file, [f"train.duration.steps={steps}", "name=called"]), runs)
    assert [signal.getsignal(number) for number in numbers] == before
print(run)
other = train(load_config(file, ["train.duration.steps=1", "name=other", "train.zero_stage=2"]), runs)
image, _ = Pipeline.load(other, weights="weight")(["a red circle", "a blue cross"], steps=2, seed=3)
print(image.size)
"""


def test_a_process_trains_as_often_as_it_likes(tmp_path, shapes_data):
    """It resumes a run, and trains another with a different ZeRO stage."""
    runs = Runs(tmp_path, shapes_data)
    command = [sys.executable, "-c", TWICE, str(runs.config), str(tmp_path)]
    done = forkserver.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {str(tmp_path / "called"), "(16, 16)"} <= set(done.stdout.splitlines())
    assert list(runs.losses("called")) == [1, 2, 3, 4]
    events = [line["event"] for line in runs.metrics("called") if "event" in line]
    assert "resume" in events


STOPPED = """
import os, signal, sys
from dico_t2i import load_config, train
from dico_t2i.training.observers.reporter import Reporter

advance = Reporter.advance
Reporter.advance = lambda self, step: (advance(self, step), os.kill(os.getpid(), signal.SIGINT))
train(load_config(sys.argv[1], ["name=stopped"]), sys.argv[2])
print("not reached")
"""


def test_an_interrupt_saves_and_ends_the_call_with_the_code_of_a_requeue(tmp_path, shapes_data):
    runs = Runs(tmp_path, shapes_data)
    done = forkserver.run(
        [sys.executable, "-c", STOPPED, str(runs.config), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 75, done.stderr
    assert "not reached" not in done.stdout
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").glob("step-*")] == ["step-00000001"]


def test_bars_are_for_terminals_and_for_notebooks_with_widgets(monkeypatch):
    class Terminal(StringIO):
        def isatty(self):
            return True

    notebook = Console(file=StringIO(), force_jupyter=True)
    assert shows_bars(Console(file=Terminal()))
    assert not shows_bars(Console(file=StringIO()))
    for installed, expected in ((object(), True), (None, False)):
        monkeypatch.setattr("dico_t2i.command.find_spec", lambda name, found=installed: found)
        assert shows_bars(notebook) == expected
