"""Networks compared on small sets in CIFAR-10's layout, and the sizes of those that are compared on CIFAR-10."""

import json
from pathlib import Path

import pytest
import torch

from dico_t2i.config import load_config
from dico_t2i.data.writer import ShardWriter
from dico_t2i.models import count_parameters
from evals import real_comparison
from evals.comparison import cost
from evals.comparison.summary import ratios
from evals.real.classifier import Network, save_classifier
from evals.real.prompts import SYNONYMS
from evals.real.stages import Judging
from tests.data_prep.test_conditions import png
from tests.test_structure import ROOT

NAMES = list(SYNONYMS)
CLAIMS = {path.stem: path for path in sorted((ROOT / "configs/real/claims").glob("*.yaml")) if "base" not in path.stem}
SMALL = (
    "model.hidden_size=8",
    "model.depths=[1, 1, 1, 1, 1]",
    "model.in_channels=3",
    "autoencoder={kind: pixels}",
    "data.image_size=32",
    "data.workers=0",
    "data.streams=16",
    "train.global_batch=16",
    "train.duration.steps=2",
    "log.every.steps=1",
    "validation.every.steps=2",
    "validation.samples=16",
    "sampler.steps=2",
)


def make_split(folder: Path, first: int, count: int = 60) -> Path:
    with ShardWriter(folder, kind="images", meta={"content": folder.name}) as writer:
        for n in range(first, first + count):
            about = {"captions": [f"a photo of a {NAMES[n % 10]}"], "class": NAMES[n % 10]}
            writer.write({"__key__": f"{n:05d}", "png": png(n), "json": about, "cls": n % 10})
    return folder


def test_networks_are_trained_sampled_judged_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], forked: None, long: bool
) -> None:
    monkeypatch.chdir(ROOT)
    splits = [make_split(tmp_path / name, first) for name, first in (("train", 0), ("held_out", 100))]
    torch.manual_seed(0)
    save_classifier(tmp_path / "c.safetensors", Network(10, 2), torch.zeros(3), torch.ones(3), NAMES, 0.1)
    changes = [*SMALL, f"data.path={splits[0]}", f"validation.path={splits[1]}"]
    options = [part for change in changes for part in ("--set", change)]
    out, runs = tmp_path / "compared.json", tmp_path / "runs"
    names = ["dico", "dico_no_cca"] if long else ["dico"]
    command = [*(f"configs/real/claims/{name}.yaml" for name in names), "--seeds", "3", "--runs", str(runs)]
    command += ["--pictures", "20", "--loss-samples", "16", "--jobs", "2", "--out", str(out), *options]
    command += ["--train", str(splits[0]), "--test", str(splits[1]), "--classifier", str(tmp_path / "c.safetensors")]
    assert real_comparison.main(command) == 0
    rows = json.loads(out.read_text())["steps"]
    for row in rows:
        assert ratios(row, rows[0], "frechet") == [row["frechet"]["mean"] / rows[0]["frechet"]["mean"]]
        assert row["frechet"]["mean"] > row["frechet_real"]["mean"] > 0
        assert {"accuracy", "near_copies", "loss", "loss_control", "alive", "effective_rank", "seconds"} <= row.keys()
    shown = capsys.readouterr().out
    assert all(word in shown for word in (*names, "real pictures", "control", "participation"))


def test_a_run_that_fails_is_named_when_the_others_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def python(*command: str, log: Path, **_: object) -> None:
        done.append(log.name)
        if log.name == "a-0.log":
            raise ValueError(f"it failed; its output is in {log}")

    monkeypatch.setattr(real_comparison, "python", python)
    plan = real_comparison.Plan(Judging(tmp_path, tmp_path, tmp_path), 20, 10)
    runs = [real_comparison.Run(CLAIMS["dico"], tmp_path / name, ()) for name in ("a-0", "b-0")]
    with pytest.raises(ValueError, match=r"1 of 2 runs failed:\n  it failed; its output is in .*a-0\.log"):
        real_comparison.carry_out_all(plan, runs, 1)
    assert done == ["a-0.log", *["b-0.log"] * 4]


def test_networks_that_are_compared_are_of_one_size() -> None:
    sizes = {
        name: (load_config(path).model.condition, count_parameters(load_config(path).model))
        for name, path in CLAIMS.items()
    }
    for condition, first in (("class", "dico"), ("text", "joint")):
        found = [size for of, size in sizes.values() if of == condition]
        assert found == pytest.approx([sizes[first][1]] * len(found), rel=0.03)
    assert real_comparison.class_conditional()[0] == Path("configs/real/claims/dico.yaml")


def test_seconds_that_were_measured_before_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [load_config(CLAIMS["dico"])] * 3
    measured: list[int] = []

    def step_seconds(found: list[object], rounds: int) -> list[float]:
        measured.append(len(found))
        return [2.0, 3.0][: len(found)]

    monkeypatch.setattr(cost, "step_seconds", step_seconds)
    kept = tmp_path / "step_seconds.json"
    assert cost.kept_step_seconds(["a", "b"], configs[:2], kept) == [2, 3]
    kept.write_text('{"a": 4, "b": 6}')
    assert cost.kept_step_seconds(["a", "b", "c"], configs, kept) == [4, 6, 6]
    assert cost.kept_step_seconds(["c", "a"], configs[:2], kept) == [6, 4]
    assert measured == [2, 2]
