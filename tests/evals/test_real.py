"""The judges of real pictures: the classifier and its training, statistics of features, prompts, and the page."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dico_t2i.data.writer import ShardWriter
from dico_t2i.sampling.images import save_images
from evals import judge_classes, judge_emoji, train_classifier
from evals.quality.distances import gaussian_of
from evals.real import judges, spaces
from evals.real.classifier import Network, load_classifier, save_classifier
from evals.real.page import write_page
from evals.real.prompts import FREE_TEMPLATES, SYNONYMS, class_asked, class_prompts
from evals.real.shards import read_images

NAMES = ["dark", "bright"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(label: int, seed: int, size: int = 32) -> torch.Tensor:
    """Noise around a dark or a bright grey, (3, size, size) uint8."""
    noise = np.random.default_rng(seed).normal(60 + 130 * label, 25, (3, size, size))
    return torch.from_numpy(noise.clip(0, 255).astype(np.uint8))


def png(image: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def make_split(folder: Path, count: int, seed: int) -> Path:
    with ShardWriter(folder, samples_per_shard=200, kind="images", meta={"content": f"{count} {seed}"}) as writer:
        for n in range(count):
            about = {"captions": [f"a {NAMES[n % 2]} photo"], "class": NAMES[n % 2]}
            image = png(picture(n % 2, 10_000 * seed + n))
            writer.write({"__key__": f"{n:05d}", "png": image, "json": about, "cls": n % 2})
    return folder


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("splits")
    return make_split(root / "train", 520, 1), make_split(root / "test", 60, 2)


@pytest.fixture(scope="module")
def classifier(splits: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("weights") / "c.safetensors"
    options = ["--train", str(splits[0]), "--test", str(splits[1]), "--out", str(out), "--epochs", "3", "--width", "2"]
    assert train_classifier.main(options) == 0
    return out


def test_the_classifier_learns_and_resumes_with_the_same_weights(
    splits: tuple[Path, Path], classifier: Path, tmp_path: Path
) -> None:
    loaded = load_classifier(classifier)
    assert loaded.accuracy > 0.95
    assert loaded.names == NAMES
    test = read_images(splits[1], 32)
    assert float((loaded(test.images)[0] == test.labels).double().mean()) == pytest.approx(loaded.accuracy)
    train, plan, out = read_images(splits[0], 32), train_classifier.Plan(3, 2, 0), tmp_path / "again.safetensors"
    train_classifier.Training(train, plan, out.with_suffix(".state")).run_epoch(lambda: None)  # and is stopped
    train_classifier.train_classifier(train, test, plan, out)
    assert load_classifier(out).sha256 == loaded.sha256
    with pytest.raises(ValueError, match="begun with other options"):
        train_classifier.Training(train, train_classifier.Plan(4, 2, 0), out.with_suffix(".state"))
    with pytest.raises(ValueError, match=r"train one with evals/train_classifier\.py"):
        load_classifier(tmp_path / "none.safetensors")


def test_augmented_images_are_moved_and_mirrored() -> None:
    images = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8).expand(200, 3, 8, 8)
    mirrored = torch.arange(200) % 2 == 0
    found = train_classifier.augmented(images, mirrored, 0, 3)
    assert found.equal(train_classifier.augmented(images, mirrored, 0, 3))
    assert found.shape == images.shape
    assert len(found.flatten(1).unique(dim=0)) > 80  # of 162 moves
    as_taken = train_classifier.augmented(images, torch.zeros(200, dtype=torch.bool), 0, 3)
    assert found[~mirrored].equal(as_taken[~mirrored])
    assert found[mirrored].equal(as_taken[mirrored].flip(-1))
    assert train_classifier.one_cycle(train_classifier.RISE) == 1
    assert train_classifier.one_cycle(1.0) == 0


def test_each_image_is_mirrored_in_every_second_epoch() -> None:
    images = torch.arange(1000)
    first, second, third = (train_classifier.alternately_mirrored(images, 0, epoch) for epoch in range(3))
    assert 0.4 < first.double().mean() < 0.6
    assert second.equal(~first)
    assert third.equal(first)


def test_shares_have_wilsons_intervals() -> None:
    value, (low, high) = judges.share(torch.tensor([True] * 80 + [False] * 20))
    assert (value, round(low, 4), round(high, 4)) == (0.8, 0.7112, 0.8666)
    assert judges.share(torch.ones(50, dtype=torch.bool))[1][0] < 1


def test_accuracy_falls_to_chance_with_the_prompts_of_others() -> None:
    asked = torch.arange(1000) % 10
    found = torch.where(torch.arange(1000) < 900, asked, (asked + 1) % 10)
    verdict = judges.accuracy("x", found, asked, 0.93)
    assert (verdict.value, verdict.real) == (pytest.approx(0.9), 0.93)
    assert verdict.control is not None
    assert 0.05 < verdict.control < 0.15


def test_frechet_distances_know_real_pictures_and_controls() -> None:
    classes = torch.arange(2000) % 2
    centres = torch.stack((torch.zeros(8), torch.full((8,), 3.0)))
    train, test, mine = (normal(2000, 8, seed=n) + centres[classes] for n in range(3))
    whole = judges.frechet(mine, test, gaussian_of(train), normal(2000, 8, seed=9) + 10)
    assert whole.real is not None
    assert whole.control is not None
    assert 0 < whole.value < 3 * whole.real + 0.1 < whole.control
    assert whole.interval[0] < whole.value < whole.interval[1]
    by_class = judges.frechet_by_class((mine, classes), (test, classes), judges.gaussians(train, classes, 2))
    assert by_class.real is not None
    assert by_class.control is not None
    assert by_class.value < 3 * by_class.real < 0.1 * by_class.control
    with pytest.raises(ValueError, match="needs 2 pictures of each, but one has 0"):
        judges.frechet_by_class((mine, classes * 0), (test, classes), judges.gaussians(train, classes, 2))


def test_copies_are_found() -> None:
    train, test = normal(3000, 16), normal(1000, 16, seed=1)
    honest = judges.copies(normal(500, 16, seed=2), test, train[:500] + 0.01, train)
    copied = judges.copies(train[:500] + 0.02 * normal(500, 16, seed=3), test, train[:500] + 0.01, train)
    assert honest[0].value < 0.03 < 0.9 < copied[0].value
    assert honest[0].control == 1.0
    assert 0.9 < honest[1].value < 1.1
    assert honest[1].interval[0] < 1 < honest[1].interval[1]
    assert copied[1].value < 0.1


def test_ranks_count_what_is_nearer() -> None:
    gallery = torch.eye(5) + 0.01
    assert judges.ranks(gallery[[3, 0]], gallery, torch.tensor([3, 0])).tolist() == [1, 1]
    query = torch.tensor([[1.0, 0.8, 0.6, 0.4, 0.2]])
    assert [int(judges.ranks(query, gallery, torch.tensor([n]))) for n in range(5)] == [1, 2, 3, 4, 5]


def test_prompts_name_their_classes() -> None:
    names = list(SYNONYMS)
    prompts = class_prompts(60, names)
    assert prompts[:2] == ["a photo of an airplane", "a photo of an automobile"]
    assert [class_asked(prompt, names) for prompt in prompts] == [n % 10 for n in range(60)]
    free = class_prompts(40, list(SYNONYMS.values()), FREE_TEMPLATES)
    assert [class_asked(prompt, names) for prompt in free] == [n % 10 for n in range(40)]
    assert not any(name in prompt.split() for prompt in free for name in names)
    assert class_asked("7", names) == 7
    with pytest.raises(ValueError, match="names none of"):
        class_asked("a photo of a catfish", names)


def test_pictures_of_classes_are_judged_and_shown(splits: tuple[Path, Path], classifier: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    images = torch.stack([picture(n % 2, 90_000 + n, 64) for n in range(40)])
    save_images(images, [f"a {NAMES[n % 2]} photo" for n in range(40)], range(40), run / "pictures")
    out = run / "judged.json"
    shards = ["--train", str(splits[0]), "--test", str(splits[1]), "--classifier", str(classifier)]
    assert judge_classes.main(["--images", str(run / "pictures"), *shards, "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    first = content["verdicts"][0]
    assert first["value"] > 0.95
    assert 0.2 < first["control"] < 0.8
    assert content["protocol"]["classifier"]["sha256"] == load_classifier(classifier).sha256
    assert len(content["verdicts"]) == 5
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 9)] + [{"step": 8, "val_loss": 0.2}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_page(run).read_text()
    assert text.count("<img") == 3
    assert "pictures taken for their class" in text


def test_pictures_find_their_concept_in_the_other_style(tmp_path: Path) -> None:
    def shards(name: str, pairs: list[tuple[int, str]]) -> Path:
        with ShardWriter(tmp_path / name, samples_per_shard=20, kind="images") as writer:
            for code, style in pairs:
                about = {"code": str(code), "style": style, "captions": [f"{style} {code}"]}
                image = png(drawn(code, style))
                writer.write({"__key__": f"{style}{code}", "png": image, "json": about})
        return tmp_path / name

    def drawn(code: int, style: str) -> torch.Tensor:
        shape = np.random.default_rng(code).integers(0, 256, (3, 8, 8)).repeat(8, 1).repeat(8, 2)
        return torch.from_numpy((shape // (1 if style == "flat" else 2)).astype(np.uint8))

    held = [(code, "flat" if code % 2 else "3d") for code in range(6)]
    kept = [(code, style) for code in range(12) for style in ("flat", "3d") if (code, style) not in held]
    known, hidden = (read_images(shards(name, pairs), 64) for name, pairs in (("kept", kept), ("held", held)))
    asked = judge_emoji.numbers_asked([f"{style} {code}" for code, style in held], hidden)
    images = torch.stack([drawn(code, style) for code, style in held])
    first, tenth, style = judge_emoji.judge_pairs(judge_emoji.pixel_features, images, asked, hidden, known)
    assert (first.value, first.real, tenth.value) == (1.0, 1.0, 1.0)
    assert first.control is not None
    assert first.control < 0.7
    assert style.value > 0.8
    wrong = judge_emoji.judge_pairs(judge_emoji.pixel_features, images.flip(0), asked, hidden, known)
    assert wrong[0].value < 0.5
    with pytest.raises(ValueError, match="is no caption of --held-out"):
        judge_emoji.numbers_asked(["flat 99"], hidden)


def test_edges_are_counted_by_their_angle() -> None:
    upright = torch.zeros(1, 3, 64, 64)
    upright[..., 32:] = 1  # the gradient goes across: angle 0
    found = spaces.edges(upright)[0]
    assert found[1:].abs().max() == 0
    assert found[0, :, 3:5].min() > 0.3
    assert found[0, :, :3].abs().max() == 0
    lying = spaces.edges(upright.transpose(2, 3))[0]
    assert torch.equal(lying[spaces.ANGLES // 2], found[0].T)
    slanted = torch.linspace(0, 1, 64)[:, None] * 0.5 + torch.linspace(0, 1, 64) * 0.5
    between = spaces.edges(slanted.expand(1, 3, 64, 64))[0]
    assert between[spaces.ANGLES // 4, 1:-1, 1:-1].min() > 0
    assert torch.allclose(spaces.edges(1 - upright), spaces.edges(upright))  # without the sign


def test_the_style_is_found_by_a_linear_classifier() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(60) % 3
    features = torch.randn(60, 100, generator=generator) + 3 * torch.eye(100)[classes]
    classify = judge_emoji.linear_classifier(features[:40], classes[:40], 3)
    assert (classify(features[:40]) == classes[:40]).all()
    assert (classify(features[40:]) == classes[40:]).double().mean() > 0.7


def test_a_classifier_of_another_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", {"names": "[]"})
    with pytest.raises(ValueError, match=r"it is not a file of evals/train_classifier\.py"):
        load_classifier(tmp_path / "x.safetensors")
    save_classifier(tmp_path / "y.safetensors", Network(2, 2), torch.zeros(3), torch.ones(3), NAMES, 0.5)
    assert load_classifier(tmp_path / "y.safetensors").accuracy == 0.5
