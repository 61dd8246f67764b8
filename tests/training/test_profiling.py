"""The trace that train.profile asks for."""

import gzip
import json

import torch

from dico_t2i.config import ProfileConfig
from dico_t2i.training.observers.profiling import Profiler
from tests.faults.harness import Run, write_data


def profiled(config, folder, steps):
    """Files in the folder after as many steps, each of one matrix product."""
    profiler = Profiler(config, folder)
    for step in range(steps):
        profiler.at(step)
        torch.ones(8, 8) @ torch.ones(8, 8)
    profiler.close()
    return sorted(path.name for path in folder.glob("*"))


def test_the_wished_steps_are_traced(tmp_path):
    assert profiled(None, tmp_path / "off", 5) == []
    assert profiled(ProfileConfig(start=7, steps=2), tmp_path / "later", 5) == []
    assert profiled(ProfileConfig(start=3, steps=9), tmp_path / "cut", 5) == ["steps-3-4.json.gz", "steps-3-4.txt"]
    folder = tmp_path / "on"
    assert profiled(ProfileConfig(start=1, steps=2), folder, 5) == ["steps-1-2.json.gz", "steps-1-2.txt"]
    events = json.loads(gzip.decompress((folder / "steps-1-2.json.gz").read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 2
    assert "aten::mm" in (folder / "steps-1-2.txt").read_text()


def test_a_run_keeps_its_trace_in_its_folder(tmp_path):
    run = Run(tmp_path, write_data(tmp_path / "data"), "run", "train.duration.steps=2", "train.profile.start=1")
    run.train(ranks=1)
    assert "convolution_backward" in (run.path / "profile" / "steps-1-1.txt").read_text()
