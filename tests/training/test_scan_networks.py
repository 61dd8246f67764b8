"""DiG, DiS and DiM through the trainer: on two ranks at ZeRO-2, stopped, resumed, exported, sampled."""

import pytest
import torch
import yaml

from data_prep.shapes import make_sample
from dico_t2i.config import SamplerConfig
from dico_t2i.data.writer import ShardWriter
from dico_t2i.export.folder import export
from dico_t2i.sampling.pipeline import load_pipeline
from tests.training.conftest import Runs

SIZES = {"hidden_size": 32, "depth": 4, "num_classes": 5, "in_channels": 3, "latent_size": 16}
NETWORKS = {
    "dig": {**SIZES, "kind": "dig", "num_heads": 2, "skips": "xavier"},
    "dis": {**SIZES, "kind": "dis", "drop_path": 0.5},
    "dim": {**SIZES, "kind": "dim", "depth": 5, "learn_sigma": False},
    "unconditional": {**SIZES, "kind": "dis", "num_classes": 0},
}


@pytest.fixture(scope="module")
def classes_data(tmp_path_factory):
    """Shapes, each with one of five classes."""
    folder = tmp_path_factory.mktemp("classes") / "data"
    with ShardWriter(folder, 32) as writer:
        for number in range(64):
            sample = make_sample(number, size=16, seed=0, two_objects=0.0, held_out=False)
            writer.write({**sample, "cls": str(number % 5).encode()})
    return folder


@pytest.fixture
def class_runs(tmp_path, classes_data):
    runs = Runs(tmp_path, classes_data)
    tree = yaml.safe_load(runs.config.read_text())
    del tree["model"], tree["text_encoder"]
    runs.config.write_text(yaml.safe_dump(tree))
    return runs


def override(kind):
    return f"model={yaml.safe_dump(NETWORKS[kind], default_flow_style=True, width=1000).strip()}"


@pytest.mark.parametrize("kind", ["dig", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("dis", "dim"))])
def test_they_go_on_where_they_stopped(class_runs, kind, long):
    """2k steps are k steps, a new start, and k more steps; DiS leaves out blocks at random."""
    k, shared = (10 if long else 2), (override(kind), "train.zero_stage=2", "sampler.guidance=1.5")
    class_runs.train("whole", *shared, f"train.duration.steps={2 * k}", ranks=2)
    for steps in (k, 2 * k):
        class_runs.train("parts", *shared, f"train.duration.steps={steps}", ranks=2)
    losses = class_runs.losses("whole")
    assert len(losses) == 2 * k
    assert class_runs.losses("parts") == losses
    if long:
        assert sum(list(losses.values())[-5:]) < sum(list(losses.values())[:5])


@pytest.mark.parametrize("kind", ["dig", "unconditional"])
def test_what_was_trained_in_bf16_can_be_exported_and_sampled(class_runs, kind):
    """With recomputed activations, at ZeRO-3, which gathers weights inside the blocks."""
    settings = ("train.duration.steps=2", "train.precision=bf16", "train.zero_stage=3")
    guidance = 1.0 if kind == "unconditional" else 2.0
    class_runs.train(
        "run", override(kind), *settings, f"sampler.guidance={guidance}", "model.checkpoint_stages=[blocks]"
    )
    export(class_runs.folder / "run", None, class_runs.folder / "exported")
    images = [
        load_pipeline(class_runs.folder / name, None, torch.device("cpu"), torch.float32).generate(
            [0, 0], [1, 2], SamplerConfig(kind="dpm++", steps=3, guidance=guidance)
        )
        for name in ("run", "exported")
    ]
    assert torch.equal(*images)
    assert images[0].shape == (2, 3, 16, 16)
