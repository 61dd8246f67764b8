"""docs/tutorial.md: all of its blocks, in order, as a reader would run them."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dico_t2i.runs.log import json_lines
from tests.documents import ROOT, blocks
from tests.forked_python import forked_python

PAGE = ROOT / "docs" / "tutorial.md"
SHARED = ("cluster", "configs", "data_prep", "docs", "evals")


def script() -> str:
    """Blocks of bash as they are, and those of Python given to the interpreter; what is no code is left out."""
    as_shell = {"bash": "{}", "python": "python - <<'SNIPPET'\n{}SNIPPET\n"}
    return "\n".join(as_shell[b.language].format(b.text) for b in blocks(PAGE) if b.language)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What looks like the root of the repository, after all commands have been run there."""
    folder = tmp_path_factory.mktemp("tutorial")
    for name in SHARED:
        (folder / name).symlink_to(ROOT / name)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("DICO_", "HF_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "XDG_CACHE_HOME": str(folder / "cache")}
    environment |= {"HOME": str(folder / "home")}
    command = ["bash", "-euxo", "pipefail", "-c", script()]
    with tempfile.TemporaryDirectory(prefix="dico-") as short, forked_python(Path(short) / "bin", environment) as bin:
        environment["PATH"] = f"{bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False
        )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert "stopped with exit code 75" in done.stdout
    return folder


def test_the_run_was_stopped_once_and_came_to_its_end(place: Path) -> None:
    lines = list(json_lines(place / "runs/photos/metrics.jsonl"))
    events = [line["event"] for line in lines if "event" in line]
    assert (events.count("start"), events.count("stop"), events.count("done")) == (2, 1, 1)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


def test_every_result_is_where_the_page_says(place: Path) -> None:
    for name in ("data/photos/report.json", "data/photos/report.png", "data/photos/samples.png"):
        assert (place / name).is_file(), name
    assert (place / "data/photos_latents/check.png").is_file()
    assert len(list((place / "samples").glob("0*.png"))) == 4
    assert np.asarray(Image.open(place / "square.png")).shape == (64, 64, 3)
    (result,) = (place / "runs/photos/evals").glob("*/*.json")
    numbers = json.loads(result.read_text())["numbers"]
    assert np.isfinite(numbers["fid"])
    assert "Sample" in (place / "report.html").read_text()
    card = (place / "exported/README.md").read_text()
    assert f"| fid | {numbers['fid']:.4f} |" in card
    assert "**Not comparable**" in card
