import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dico_t2i.config import load_config
from dico_t2i.export.folder import export
from dico_t2i.runs.checkpoint import CheckpointError
from dico_t2i.sampling.pipeline import load_pipeline
from tests.faults.harness import Run, write_data

KINDS = ("weight", "ema_0.9", "ema_0.99")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("export") / "data")


def exports(run, folder):
    """What is exported of a run, by kind."""
    for kind in KINDS:
        export(run.path, kind, folder / f"{run.name}-{kind}")
    return {kind: load_file(folder / f"{run.name}-{kind}" / "model.safetensors") for kind in KINDS}


def test_weights_and_averages_are_whole_from_any_stage_and_ranks(tmp_path, data, long):
    plain = Run(tmp_path, data, "plain", "train.duration.steps=4", "train.zero_stage=0")
    plain.train(ranks=1)
    expected = exports(plain, tmp_path)
    for kind, other in (("weight", "ema_0.9"), ("ema_0.9", "ema_0.99")):
        assert any((expected[kind][name] - expected[other][name]).abs().max() > 1e-4 for name in expected[kind])
    for stage, ranks in ((0, 2), (1, 2), (2, 4), (3, 2)) if long else ((2, 4), (3, 2)):
        run = Run(tmp_path, data, f"stage{stage}", "train.duration.steps=4", f"train.zero_stage={stage}")
        run.train(ranks=ranks)
        for kind, weights in exports(run, tmp_path).items():
            assert weights.keys() == expected[kind].keys()
            for name, weight in weights.items():
                torch.testing.assert_close(weight, expected[kind][name], rtol=1e-4, atol=1e-5)


def test_an_export_carries_its_config_and_what_is_not_there_is_named(tmp_path, data):
    run = Run(tmp_path, data, "run", "train.duration.steps=2")
    run.train(ranks=1)
    result = {"protocol": {"name": "coco"}, "protocol_hash": "ab", "comparable": True}
    for step, fid in ((1, 8.5), (2, 7.25)):
        file = run.path / "evals" / "coco" / f"{step:08d}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**result, "step": step, "numbers": {"fid": fid}}))
    export(run.path, None, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| fid | 7.2500 |" in card
    assert "| fid | 8.5000 |" not in card
    assert load_config(tmp_path / "out" / "config.yaml") == load_config(run.path / "config.yaml")
    with pytest.raises(ValueError, match="nothing is overwritten"):
        export(run.path, None, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"no ema_0\.5; it holds ema_0\.9, ema_0\.99, weight"):
        export(run.path, "ema_0.5", tmp_path / "other")
    with pytest.raises(CheckpointError, match="no exp_avg"):
        export(run.path, "exp_avg", tmp_path / "other")
    with pytest.raises(ValueError, match="is an exported folder already"):
        export(tmp_path / "out", None, tmp_path / "other")
    export(run.checkpoints / "latest", "weight", tmp_path / "a: b #1")
    pipeline = load_pipeline(tmp_path / "a: b #1", "weight", torch.device("cpu"), torch.float32)
    assert pipeline.config.model == load_config(run.path / "config.yaml").model
    with pytest.raises(ValueError, match="is an export that holds only weight"):
        load_pipeline(tmp_path / "a: b #1", "ema_0.9", torch.device("cpu"), torch.float32)
    lost = load_file(tmp_path / "out" / "model.safetensors")
    lost["stem.bias"][0] = torch.nan
    (tmp_path / "out" / "model.safetensors").unlink()
    save_file(lost, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ValueError, match=r"stem\.bias is not finite"):
        load_pipeline(tmp_path / "out", None, torch.device("cpu"), torch.float32)
    (shard,) = run.checkpoints.glob("*/*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="bytes, should be"):
        export(run.path, None, tmp_path / "other")
    assert not (tmp_path / "other").exists()
