import json
from pathlib import Path

import pytest

from data_prep import shapes
from dico_t2i.config import load_config
from dico_t2i.models import count_parameters
from evals import shapes_comparison
from evals.comparison.cost import step_seconds
from evals.comparison.equal import equal_time
from evals.comparison.summary import interval

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
    tables = json.loads(out.read_text())
    (row,) = tables["steps"]
    assert row["parameters"] == pytest.approx(1.25e6, rel=0.01)
    assert 0.5 < row["val_loss"]["mean"] < 2
    assert row["val_loss"]["values"] == [row["val_loss"]["mean"]]
    assert row["val_loss"]["interval"] == 0
    assert 0.5 < row["val_loss_t62"]["mean"] < 2
    assert {"all", "binding", "relation", "order"} <= row.keys()
    assert "mmdit" in capsys.readouterr().out


def test_equal_time_is_that_of_the_first_network():
    configs = [load_config(ROOT / f"configs/shapes/{name}.yaml") for name in ("dico", "mmdit", "pixart")]
    for config, seconds in zip(configs, step_seconds(configs, 1), strict=True):
        assert seconds > 0, config.name
    changes = equal_time(configs, [0.2, 0.4, 0.1])
    steps = [load_config(ROOT / "configs/shapes/dico.yaml", change).train.duration.steps for change in changes]
    assert steps == [2400, 1200, 4800]
    staged = load_config(ROOT / "configs/shapes/stages/two_stages.yaml")
    with pytest.raises(ValueError, match="shapes_two_stages has stages"):
        equal_time([staged], [0.2])


def test_intervals_are_those_of_student():
    assert interval([1.0]) == 0
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)


def test_the_networks_are_of_one_size():
    """The networks beside DiCo have as many parameters as it, to 1.2 %."""
    configs = (load_config(ROOT / f"configs/shapes/{name}.yaml") for name in ("dico", "mmdit", "pixart"))
    dico, *others = (count_parameters(config.model) for config in configs)
    assert others == pytest.approx([dico] * 2, rel=0.012)
