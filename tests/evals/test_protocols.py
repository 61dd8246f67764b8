"""Protocols and their hashes, the draw of captions, sets of images, and what is wrong with them."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dico_t2i.config import ConfigError
from dico_t2i.training.ranks.distributed import World
from evals.quality import scoring, weights
from evals.quality.captions import draw, find_files
from evals.quality.distances import gaussian_of
from evals.quality.feature_sets import FeatureSet, collect
from evals.quality.features import LOGITS, POOL
from evals.quality.images import adm_crop, open_images, write_npz
from evals.quality.options import add_protocol_options, chosen_protocol
from evals.quality.protocol import Prompts, changes_of, load_protocol, names
from evals.quality.references import FeatureCache, read_adm_statistics

# A change here makes all numbers published under the old hash another protocol's: give it another name instead.
HASHES = {
    "clean-coco30k": "91361ef3ba42ebb1",
    "coco-repa": "86486f3c9520a74c",
    "coco-uvit": "8e14459e03c2eae4",
    "coco30k-zeroshot": "ebe636b7ac36cf9b",
    "imagenet50k-adm": "da67c45aa9b004ae",
}


def test_hashes_are_those_that_numbers_were_published_under() -> None:
    assert {name: load_protocol(name).hash() for name in names()} == HASHES


def test_a_change_renames_and_rehashes() -> None:
    plain = load_protocol("coco-uvit")
    changed = load_protocol("coco-uvit", ["sampler.guidance=3", "prompts.count=10"])
    assert (changed.name, changes_of(plain)) == ("coco-uvit+changes", [])
    assert changed.hash() != plain.hash()
    assert changes_of(changed) == ["prompts.count: 30000 -> 10", "sampler.guidance: 2.0 -> 3.0"]
    assert load_protocol("coco-uvit", ["sampler.guidance=2"]) == plain


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("coco30k", [], "unknown; known protocols: clean-coco30k, coco-repa"),
        ("coco-uvit", ["guidance=3"], "guidance: unknown key"),
        ("coco-uvit", ["sampler.steps=ten"], "sampler.steps"),
        ("coco-uvit", ["prompts.rule=uniform"], "required with rule: uniform"),
        ("coco-uvit", ["name=mine"], "the name must be that of the file"),
    ],
)
def test_wrong_protocols(name: str, change: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_protocol(name, change)


def test_metrics_of_another_protocol() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_protocol_options(parser)
    with pytest.raises(ValueError, match="--metrics sfid: not in coco-uvit"):
        chosen_protocol(parser.parse_args(["--protocol", "coco-uvit", "--metrics", "fid,sfid"]))


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    """100 images of 3 to 7 captions, one of which is blank."""
    images = [{"id": 7 * i + 1, "file_name": f"{i}.jpg"} for i in range(100)]
    items = [
        {"id": 1000 + 10 * i + k, "image_id": image["id"], "caption": f" {i}  {k}\n" if k else " "}
        for i, image in enumerate(images)
        for k in range(3 + i % 5)
    ]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": items, "categories": []}))
    return path


def test_draw_depends_on_nothing_but_ids(annotations: Path, tmp_path: Path) -> None:
    drawn = draw(annotations, Prompts(rule="drawn", count=60))
    content = json.loads(annotations.read_text())
    for items in (content["images"], content["annotations"]):
        random.Random(0).shuffle(items)
    shuffled = tmp_path / "shuffled.json"
    shuffled.write_text(json.dumps(content))
    again = draw(shuffled, Prompts(rule="drawn", count=60))
    assert (drawn.image_ids, drawn.captions) == (again.image_ids, again.captions)
    assert drawn.source["drawn_sha256"] == again.source["drawn_sha256"]
    assert drawn.source["captions_sha256"] != again.source["captions_sha256"]
    assert drawn.image_ids[:20] == draw(annotations, Prompts(rule="drawn", count=20)).image_ids
    assert drawn.image_ids != draw(annotations, Prompts(rule="drawn", count=60, seed=1)).image_ids


def test_draw_is_of_distinct_images_and_any_caption(annotations: Path) -> None:
    drawn = draw(annotations, Prompts(rule="drawn", count=100))
    assert len(set(drawn.image_ids)) == 100
    assert sorted(drawn.image_ids) == list(draw(annotations, Prompts(rule="in_order", count=100)).image_ids)
    assert list(drawn.image_ids) != sorted(drawn.image_ids)
    for image, caption, file in zip(drawn.image_ids, drawn.captions, drawn.files, strict=True):
        assert caption.split()[0] == str((image - 1) // 7) == Path(file).stem
    chosen = Counter(int(caption.split()[1]) for caption in drawn.captions)
    assert min(chosen[1], chosen[2]) >= 15
    assert chosen[6] >= 1


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (Prompts(rule="drawn", count=101), "100 images have captions, but this protocol draws 101"),
        (Prompts(rule="drawn", count=10, annotated_images=40504), "annotates 100 images.*split of 40504"),
    ],
)
def test_captions_that_do_not_fit(annotations: Path, prompts: Prompts, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(annotations, prompts)


def _save(folder: Path, name: str, size: tuple[int, int]) -> None:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(len(list(folder.iterdir())))
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)).save(folder / name)


def test_missing_wrong_and_empty_images(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    _save(folder, "a.png", (20, 16))
    _save(folder, "b.png", (16, 16))
    with pytest.raises(ValueError, match=r"1 of 2 reference images are missing \(c.png\)$"):
        find_files(("a.png", "c.png"), folder)
    with pytest.raises(ValueError, match="a different split, or empty"):
        find_files(("c.png",), folder)
    with pytest.raises(ValueError, match="20x16 pixels, expected 16x16"):
        open_images(folder, "none", 16).read(range(2))
    (folder / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b\.png: "):
        open_images(folder, "none").read(range(2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there are no images in it"):
        open_images(tmp_path / "empty", "none")
    with pytest.raises(ValueError, match="neither a folder nor an npz"):
        open_images(tmp_path / "nothing", "none")


def test_npz_in_adms_layout(tmp_path: Path) -> None:
    """What is written reads back, by numpy and mapped; what ADM's files hold besides is found."""
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    path = tmp_path / "images.npz"
    write_npz(path, images.shape, [images[:3], images[3:]])
    assert np.array_equal(np.load(path)["arr_0"], images)
    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048), arr_0=images)
        found = open_images(tmp_path / "other.npz", "none", 8)
        assert np.array_equal(found.read(range(1, 4)), images[1:4])
        assert set(read_adm_statistics(tmp_path / "other.npz")) == {POOL}
    with pytest.raises(ValueError, match="8x8 pixels, expected 16x16"):
        open_images(path, "none", 16)
    np.savez(tmp_path / "small.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(ValueError, match="a different extractor: mean"):
        read_adm_statistics(tmp_path / "small.npz")
    with pytest.raises(ValueError, match="has no images"):
        open_images(tmp_path / "small.npz", "none")


def test_statistics_of_another_extractor(tmp_path: Path) -> None:
    """ADM's are of the published Inception, a file of the cache says of which; here no network is at hand."""
    cache = FeatureCache(tmp_path, [], World(0, 1, 0, torch.device("cpu")), 4)
    extractor = load_protocol("imagenet50k-adm").extractor
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="statistics of a different extractor, the FID Inception"):
        cache.of_path(tmp_path / "adm.npz", extractor)
    kept = tmp_path / "kept.safetensors"
    tensors = {"n": torch.tensor(3), "mean.pool": torch.zeros(2), "cov.pool": torch.eye(2)}
    save_file(tensors, kept, {"source": json.dumps({"networks": [{"sha256": "another"}]})})
    with pytest.raises(ValueError, match="statistics of a different extractor"):
        cache.of_path(kept, extractor)
    save_file(tensors, kept, {"source": json.dumps({"networks": []})})
    assert cache.of_path(kept, extractor).n == 3


def test_warnings_and_metrics_without_their_features() -> None:
    few = FeatureSet(50, {POOL: gaussian_of(torch.randn(9, 2))})
    assert [line.split()[0] for line in scoring.warnings(100, few)] == ["50", "100"]
    assert scoring.warnings(30000, FeatureSet(40504, {})) == []
    settings = load_protocol("coco-uvit").scoring
    for metric, message in (("sfid", "this extractor only gives pool"), ("kid", "statistics only, no images")):
        with pytest.raises(ValueError, match=message):
            scoring.check_metrics(settings, [metric], 100, {POOL}, few)  # type: ignore[list-item]
    some = FeatureSet(3, {}, {POOL: torch.randn(3, 2)})
    for metric, message in (
        ("is", "9 samples cannot be divided into 10 parts"),
        ("recall", "3 images have fewer than 3 neighb"),
    ):
        with pytest.raises(ValueError, match=message):
            scoring.check_metrics(settings, [metric], 9, {POOL, LOGITS}, some)  # type: ignore[list-item]


def test_adm_crop_halves_before_it_interpolates() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 128, 3)).astype(np.uint8)
    found = adm_crop(Image.fromarray(pixels), 16)
    middle = pixels[:, 32:96].reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    assert np.abs(found - middle).max() <= 2  # two halvings and a bicubic step, each rounded
    assert adm_crop(Image.fromarray(pixels[:48, :40]), 32).shape == (32, 32, 3)


def test_collected_rows_and_moments() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    chunks: list[dict[str, Any]] = [{POOL: part} for part in x.split(8)]
    whole, part = collect(chunks, 50), collect(chunks, 50, manifold=20)
    assert torch.equal(whole.rows[POOL], x)
    assert part.rows[POOL].shape == (20, 6)
    assert torch.equal(part.gaussians[POOL].cov, whole.gaussians[POOL].cov)
    np.testing.assert_allclose(whole.gaussians[POOL].cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-12)


def test_a_download_of_other_content_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file: address, so that no network is needed."""
    source = tmp_path / "source"
    source.write_bytes(b"something else")
    extractor = load_protocol("coco-uvit").extractor
    monkeypatch.setenv("DICO_ALLOW_DOWNLOAD", "1")
    monkeypatch.setitem(weights._SOURCES, extractor.file, source.as_uri())
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=r"expected 6726825d\.\.\.; the file was deleted"):
        weights.find_weights(extractor, None, cache)
    assert not any(cache.iterdir())
    fits = extractor.model_copy(update={"sha256": weights._sha256(source)[:8]})
    assert weights.find_weights(fits, None, cache).doubt is None
