import json
from pathlib import Path

import pytest

from data_prep import shapes
from evals import shapes_comparison

ROOT = Path(__file__).resolve().parents[2]


def test_runs_are_trained_sampled_and_summed_up(tmp_path, monkeypatch, capsys, forked):
    monkeypatch.chdir(ROOT)
    for name, seed in (("train", "0"), ("held_out", "1")):
        where = ["--out", str(tmp_path / name), "--samples", "64", "--size", "16", "--seed", seed]
        assert shapes.main(where) == 0
    changes = ["train.duration.steps=2", "validation.every.steps=2", "validation.samples=32", "log.every.steps=1"]
    changes += [f"data.path={tmp_path / 'train'}", f"validation.path={tmp_path / 'held_out'}", "sampler.steps=2"]
    options = [part for change in changes for part in ("--set", change)]
    out = tmp_path / "compared.json"
    command = ["configs/shapes/mmdit.yaml", "--seeds", "3", "--runs", str(tmp_path), "--prompts", "4", *options]
    assert shapes_comparison.main([*command, "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())
    assert row["parameters"] == pytest.approx(1.25e6, rel=0.01)
    assert 0.5 < row["val_loss"]["mean"] < 1.5
    assert row["val_loss"]["values"] == [row["val_loss"]["mean"]]
    assert "mmdit" in capsys.readouterr().out


def test_the_networks_are_of_one_size():
    """The transformers beside DiCo have as many parameters as it, to 1.2 %."""
    dico, *others = (
        shapes_comparison.summary(ROOT / f"configs/shapes/{name}.yaml", [], [NUMBERS])["parameters"]
        for name in ("dico", "mmdit", "pixart")
    )
    assert others == pytest.approx([dico] * 2, rel=0.012)


NUMBERS = dict.fromkeys(shapes_comparison.SHOWN, 0.5)
