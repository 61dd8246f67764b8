"""The stages of a run on real pictures, and in the long form a run from end to end on a small set."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evals import real_pictures
from evals.real.prompts import SYNONYMS
from evals.real.results import read_verdicts
from tests.data_prep.test_conditions import png
from tests.test_structure import ROOT


@pytest.mark.parametrize("name", real_pictures.SETS)
def test_stages_prepare_before_they_train_and_judge_at_the_end(name: str) -> None:
    stages = list(real_pictures.Plan(Path("/sets"), name, 100, 40, ("train.duration.steps=2",)).stages())
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    assert names.index("train") < names.index("pictures") < names.index("judge") == len(names) - 1
    assert ("classifier" in names, "free" in names) == ("emoji" not in name, name in real_pictures.SETS[:2])
    train = stages[names.index("train")].command
    assert train[-1] == "train.duration.steps=2"
    assert (ROOT / train[train.index("--config") + 1]).is_file()
    encoded = {name.removeprefix("encode ") for name in names if name.startswith("encode ")}
    assert encoded <= {name.removeprefix("import ") for name in names if name.startswith("import ")}
    assert bool(encoded) == ("autoencoder.path=/sets/taef2" in train)


@pytest.mark.parametrize("name", real_pictures.SETS)
def test_one_precision_is_that_of_encoding_training_and_classifier(name: str) -> None:
    plan = real_pictures.Plan(Path("/sets"), name, 100, 40, (), "bf16")
    commands = {stage.name: stage.command for stage in plan.stages()}
    assert "train.precision=bf16" in commands["train"]
    for stage, command in commands.items():
        if stage == "classifier" or stage.startswith("encode "):
            assert command[command.index("bf16") - 1] in ("--dtype", "--precision")


@pytest.mark.long
def test_a_small_run_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(SYNONYMS)
    for split, count in (("train", 300), ("test", 80)):
        rows = [
            {"img": {"bytes": png(n), "path": f"{n}.png"}, "label": n % 10, "class": names[n % 10]}
            for n in np.random.default_rng(0).permutation(count).tolist()
        ]
        (tmp_path / "sets" / "cifar10").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sets" / "cifar10" / f"{split}.parquet")
    for folder in ("configs", "data_prep", "dico_t2i", "evals"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    changes = [
        "train.duration.steps=2",
        "model.depths=[1,1,1,1,1]",
        "text_encoder.weights=seeded",
        "text_encoder.seeded={width: 384, layers: 1, heads: 4}",
        "validation.samples=64",
        "validation.every.steps=2",
        "preview.every.steps=2",
        "sampler.steps=3",
        "data.workers=0",
    ]
    arguments = ["--data", str(tmp_path / "sets"), "--pictures", "40", "--free", "20", *changes]
    assert real_pictures.main(arguments) == 0
    assert len(read_verdicts(Path("runs/cifar10_t2i/judged.json"))) == 7
    page = Path("runs/cifar10_t2i/real.html").read_text()
    assert page.count("<img") == 4
