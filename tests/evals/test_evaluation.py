"""The whole of coco_fid.py on a small trained run with tiny_coco: ranks, a kill, bad input; FID against clean-fid."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evals import compare
from evals.quality.distances import frechet_distance, gaussian_of
from evals.quality.extractors import Inception, _pooled, resize_images, scale_pixels
from evals.quality.features import POOL
from evals.quality.generation import find_subject
from evals.quality.images import open_images
from evals.quality.protocol import load_protocol
from evals.quality.weights import Weights
from tests import forkserver
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT.parent / "shared" / "data" / "tiny_coco"
CAPTIONS = TINY / "annotations" / "captions_train2017.json"
needs_coco = pytest.mark.skipif(not TINY.is_dir(), reason="needs shared/data/tiny_coco")

COUNT, CHUNK = 12, 3
CHANGES = [
    "prompts.annotated_images=null",
    f"prompts.count={COUNT}",
    "image_size=16",
    "reference.images=drawn",
    "sampler={kind: dpm++, steps: 3, guidance: 2.0}",
    f"chunk={CHUNK}",
    "scoring.kid_subsets=3",
    "scoring.kid_subset_size=8",
]
NUMBERS = {"fid", "sfid", "is", "is_std", "precision", "recall", "kid", "kid_std"}


def python(*arguments: str | Path) -> None:
    done = forkserver.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image run of three steps on tiny_coco at 16 px."""
    folder = tmp_path_factory.mktemp("run")
    data = folder / "data"
    python(
        "data_prep/coco.py", "--images", TINY, "--captions", CAPTIONS, "--out", data, "--size", "16", "--workers", "1"
    )
    small = ["model.hidden_size=16", "model.depths=[1,1,1,1,1]", "model.text_dim=32", "model.pooled_dim=32"]
    tower = ["text_encoder.seeded.width=32", "text_encoder.seeded.layers=1", "text_encoder.seeded.heads=2"]
    length = [
        "train.duration={steps: 3}",
        "train.global_batch=8",
        "data.streams=8",
        "data.workers=0",
        "preview.every=null",
    ]
    command = ["-m", "dico_t2i", "train", "--config", "configs/quickstart.yaml", "--runs", folder, f"data.path={data}"]
    python(*command, *small, *tower, *length, "name=small", "log.wandb=disabled")
    return folder / "small"


def coco_command(run: Path, cache: Path, out: Path, *more: str) -> list[str]:
    command = ["evals/coco_fid.py", "--checkpoint", run, "--images", TINY, "--captions", CAPTIONS, "--out", out]
    options = ["--protocol", "coco30k-zeroshot", "--metrics", "fid,sfid,is,precision,recall,kid", "--resamples", "2"]
    changes = [part for change in CHANGES for part in ("--set", change)]
    return [*map(str, command), *options, *changes, "--extractor", "seeded", "--cache", str(cache), *more]


def ranks(count: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", str(free_port())]


@pytest.fixture(scope="module")
def evaluated(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """Cache, folder of results, and the result of one rank left alone."""
    cache, out = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("results")
    python(*coco_command(run, cache, out, "--save", "png"))
    (path,) = out.glob("coco30k-zeroshot+changes-*/*.json")
    return cache, out, json.loads(path.read_text())


@needs_coco
def test_result_says_what_it_is(evaluated: tuple[Path, Path, dict[str, Any]]) -> None:
    cache, out, result = evaluated
    assert set(result["numbers"]) == NUMBERS
    assert all(np.isfinite(value) for value in result["numbers"].values())
    assert not result["comparable"]
    assert result["doubts"] == ["seeded extractor"]
    assert f"prompts.count: 30000 -> {COUNT}" in result["changes"]
    assert result["protocol_hash"] == load_protocol("coco30k-zeroshot", CHANGES).hash()
    assert result["weights"] == "ema_0.995"
    assert set(result["seconds"]) == {"sampling", "decoding", "features", "statistics"}
    assert len(list((cache / "references").glob("*.safetensors"))) == 1
    assert len(list(out.rglob("*.images/*.png"))) == COUNT
    assert not list(out.rglob("chunk-*"))


@needs_coco
def test_two_ranks_killed_half_way_give_the_same_numbers(
    run: Path, evaluated: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, _, alone = evaluated
    cache, out = tmp_path / "cache", tmp_path / "results"
    command = [sys.executable, *ranks(2), *coco_command(run, cache, out)]
    process = forkserver.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(out.rglob("chunk-*.safetensors")):
        assert process.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert 0 < len(list(out.rglob("chunk-*.safetensors"))) < COUNT // CHUNK
    python(*ranks(2), *coco_command(run, cache, out))
    (path,) = out.glob("*/*.json")
    result = json.loads(path.read_text())
    assert result["numbers"] == alone["numbers"]
    assert result["standard_errors"] == alone["standard_errors"]
    assert result["sources"] == alone["sources"]


@needs_coco
def test_compare_shows_runs_side_by_side(
    evaluated: tuple[Path, Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, step in (("a", 3), ("a", 6), ("b", 6)):
        shutil.copytree(evaluated[1], tmp_path / name / "evals", dirs_exist_ok=True)
        (path,) = (tmp_path / name / "evals").glob("*/00000003.json")
        result = {**json.loads(path.read_text()), "subject": f"{name}, step {step}", "step": step}
        path.with_name(f"{step:08d}.json").write_text(json.dumps(result))
        if step != 3:
            shutil.copytree(path.with_suffix(".examples"), path.with_name(f"{step:08d}.examples"))
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]) == 0
    assert "NOT COMPARABLE" in capsys.readouterr().out
    assert {path.name.split("-")[-1] for path in (tmp_path / "out").iterdir()} == {"curves.png", "grid.png"}
    with pytest.raises(ValueError, match="no results; evaluate it first"):
        compare.main([str(tmp_path / "out")])


@needs_coco
def test_checkpoints_that_do_not_fit(run: Path, tmp_path: Path) -> None:
    protocol = load_protocol("coco30k-zeroshot", ["image_size=16"])
    assert find_subject(run, protocol).weights == "ema_0.995"
    with pytest.raises(ValueError, match="makes images of 16 px, but coco30k-zeroshot is for 256"):
        find_subject(run, load_protocol("coco30k-zeroshot"))
    with pytest.raises(ValueError, match=r"is text-conditional, but .* is for class"):
        find_subject(run, load_protocol("imagenet50k-adm", ["image_size=16"]))
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    config = bare / "config.yaml"
    config.write_text(config.read_text().replace("ema:\n  - 0.995", "ema: []"))
    with pytest.raises(ValueError, match="has no average of the weights"):
        find_subject(bare, protocol)
    assert (
        find_subject(bare, load_protocol("coco30k-zeroshot", ["image_size=16", "weights=weight"])).weights == "weight"
    )


@pytest.fixture(scope="module")
def network() -> Inception:
    return Inception("clean", Weights(None, "seeded", None), torch.device("cpu"))


@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow", "legacy_pytorch"])
def test_clean_fids_own_pipeline_gives_the_same_fid(mode: Any, network: Inception, tmp_path: Path) -> None:
    """On the first 3 of 2048 features, for which 5 images make a covariance."""
    from cleanfid import fid

    rng = np.random.default_rng(0)
    for name, spread in (("a", 60), ("b", 90)):
        (tmp_path / name).mkdir()
        for i in range(5):
            image = rng.normal(rng.uniform(50, 200, 3), spread, (24, 24, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
    network.resize = mode
    mine = [
        gaussian_of(network(open_images(tmp_path / name, "none").read(range(5)))[POOL][:, :3]) for name in ("a", "b")
    ]

    def extract(x: torch.Tensor) -> torch.Tensor:
        if mode == "legacy_tensorflow":  # clean-fid leaves this resize to the network
            x = resize_images([image.permute(1, 2, 0).byte().numpy() for image in x], mode)
        return _pooled(network._net, scale_pixels(x, mode))[:, :3]

    theirs = fid.compute_fid(
        str(tmp_path / "a"),
        str(tmp_path / "b"),
        mode=mode,
        custom_feat_extractor=extract,
        device=torch.device("cpu"),
        num_workers=0,
        batch_size=8,
        verbose=False,
    )
    assert frechet_distance(*mine) == pytest.approx(theirs, rel=1e-6)
