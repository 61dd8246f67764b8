"""Commands of the documentation, run as they stand there, in a folder of small stand-ins for data, weights and runs."""

import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from dico_t2i.models import DiCoConfig
from tests import forkserver
from tests.documents import PAGES, ROOT, blocks, page_commands
from tests.encoders.test_text import PROJECTED, save_clip
from tests.models.test_official import released_state
from tests.shards import image_bytes
from tests.small_models import save_autoencoder

RUN = """
python data_prep/coco.py --images coco/train2014 --captions coco/annotations/captions_train2014.json --out data/coco256
python data_prep/latents.py --data data/coco256 --out data/coco256_latents --autoencoder stabilityai/sd-vae-ft-ema
python data_prep/verify.py data/coco256_latents
python data_prep/verify.py data/coco256_latents --repair --source data/coco256 --autoencoder stabilityai/sd-vae-ft-ema
python data_prep/folder.py --images photos --table a.parquet b.parquet --path-column file --caption-columns short long \
--out data/photos
dico doctor
dico prefetch --config configs/dico_s_t2i.yaml --out weights
dico prefetch --out weights --check
dico train --config configs/coco_dwc.yaml log.tensorboard=true
dico sample --checkpoint runs/coco_dwc --prompt 'a red bus' --prompt 'two dogs on a beach' --out samples
dico export --checkpoint runs/coco_dwc --out exported
dico sample --checkpoint exported --prompts prompts.txt --fast --guidance 3 --out more
dico import-official DiCo-XL-256.pt --out dico-xl
dico sample --checkpoint dico-xl --labels 'golden retriever' 360 --out retrievers
dico report runs/coco_dwc --out report.html
dico report runs/coco_dwc runs/coco_crossattn --out compared.html
python cluster/status.py
python -m dico_t2i.data DIR
python -m dico_t2i.data DIR --buckets 256
python data_prep/duplicates.py data/laion --distance 3
dico completion bash
"""
COMMANDS = [tuple(shlex.split(line)) for line in RUN.strip().splitlines()]
DOCUMENTED = {command.words for page in PAGES for command in page_commands(page)}
SMALL: dict[str, Any] = {"hidden_size": 8, "depths": [1, 1, 1, 1, 1], "mlp_ratio": 2}
COCO_DWC = {
    "extends": "base_t2i.yaml",
    "name": "coco_dwc",
    "model": {**SMALL, "text_dim": 16, "pooled_dim": PROJECTED},
    "data": {"path": "data/coco256_latents", "streams": 4, "workers": 0},
    "train": {"duration": {"steps": 2}, "global_batch": 4, "micro_batch": 4, "precision": "fp32", "zero_stage": 0},
    "log": {"every": {"steps": 1}, "wandb": "disabled"},
    "sampler": {"kind": "dpm++", "steps": 3},
}


def save_data(folder: Path) -> None:
    """COCO's files, and photos with tables of captions."""
    for name in ("coco/train2014", "coco/annotations", "photos"):
        (folder / name).mkdir(parents=True)
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 300, "height": 280} for n in range(8)]
    captions = [{"id": n, "image_id": n, "caption": f"photo number {n}"} for n in range(8)]
    for n in range(8):
        (folder / f"coco/train2014/{n}.jpg").write_bytes(image_bytes(n, (300, 280)))
        (folder / f"photos/{n}.jpg").write_bytes(image_bytes(n, (300, 280)))
    described = json.dumps({"images": images, "annotations": captions})
    (folder / "coco/annotations/captions_train2014.json").write_text(described)
    for name, numbers in (("a", range(4)), ("b", range(4, 8))):
        rows = [{"file": f"{n}.jpg", "short": f"photo {n}", "long": f"a long text about photo {n}"} for n in numbers]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    for name in ("DIR", "data/laion"):  # made by the first command
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(folder / "data/coco256")


def save_models(folder: Path) -> None:
    """Weights under the names of the real ones, and a released file."""
    save_autoencoder(folder / "models/stabilityai/sd-vae-ft-ema")
    save_clip(folder / "models/openai/clip-vit-large-patch14")
    torch.save({"ema": released_state(DiCoConfig(**SMALL))}, folder / "DiCo-XL-256.pt")
    (folder / "prompts.txt").write_text("a red bus\ntwo dogs\n")


def save_configs(folder: Path) -> None:
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "configs/coco_dwc.yaml").write_text(yaml.safe_dump(COCO_DWC))
    (folder / "runs").mkdir()
    (folder / "runs/coco_crossattn").symlink_to("coco_dwc")


def run(words: tuple[str, ...]) -> int:
    """The exit code. In this process, which has the libraries loaded; a training gets one of its own."""
    if words[:2] == ("dico", "train"):
        return subprocess.run([sys.executable, "-m", "dico_t2i", *words[1:]], check=False).returncode
    program = ["-m", "dico_t2i"] if words[0] == "dico" else []
    first, *arguments = [*program, *words[1:]]
    try:
        if first == "-m":
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *arguments]
            runpy.run_path(first, run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What looks like the root of the repository to the commands that run there."""
    folder = tmp_path_factory.mktemp("documented")
    for name in ("cluster", "data_prep", "docs", "evals"):
        (folder / name).symlink_to(ROOT / name)
    save_data(folder)
    save_models(folder)
    save_configs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in (
            ("DICO_WEIGHTS", str(folder / "models")),
            ("PYTHONPATH", str(ROOT)),
            ("OMP_NUM_THREADS", "1"),
        ):
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(os, "cpu_count", lambda: 1)  # no processes beside this one
        yield folder


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What commands change in their process, they change for nobody else."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("words", COMMANDS, ids=shlex.join)
def test_commands_run_one_after_the_other(words: tuple[str, ...], place: Path, restored: None) -> None:
    assert words in DOCUMENTED, "not in the documentation any more"
    assert run(words) == 0


def test_what_they_made(place: Path) -> None:
    for name in ("samples/grid.png", "more/00001.png", "retrievers/00001.png", "report.html", "compared.html"):
        assert (place / name).is_file(), name
    for name in ("exported/model_index.json", "dico-xl/model_index.json", "weights/manifest.json"):
        assert json.loads((place / name).read_text()), name
    assert sorted(path.name for path in (place / "weights").iterdir()) == ["manifest.json", "openai", "stabilityai"]
    assert len(list((place / "runs/coco_dwc/checkpoints").glob("step-*"))) == 1
    assert list((place / "runs/coco_dwc/tensorboard").iterdir())


def test_the_examples_of_python_run_one_after_the_other(place: Path) -> None:
    examples = [block.text for block in blocks(ROOT / "docs" / "python.md") if block.language == "python"]
    assert [len(example.strip().splitlines()) <= 6 for example in examples] == [True] * 3
    (place / "examples.py").write_text("\n".join(examples))
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    command = [sys.executable, str(place / "examples.py")]
    done = forkserver.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the run is in runs/from_python" in done.stdout
    assert len(list((place / "runs/from_python/checkpoints").glob("step-*"))) == 1
    with Image.open(place / "bus.png") as image:
        assert image.size == (256, 256)
