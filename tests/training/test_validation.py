import pytest
import torch
import torch.distributed as dist

from data_prep import shapes
from dico_t2i import randomness
from dico_t2i.config import ConfigError, load_config
from dico_t2i.diffusion import build
from dico_t2i.encoders.load import load_encoders
from dico_t2i.training.inputs import InputMaker
from dico_t2i.training.observers.validation import Validation, band_middles
from dico_t2i.training.ranks.distributed import World

VALIDATED = ("validation.every.steps=4", "validation.samples=16", "validation.bands=4")


@pytest.fixture(scope="session")
def held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out") / "data"
    shapes.main(["--out", str(folder), "--samples", "24", "--size", "16", "--seed", "7", "--samples-per-shard", "9"])
    return folder


def validations(runs, name):
    return {m["step"]: m for m in runs.metrics(name) if "val_loss" in m}


def test_any_number_of_ranks_finds_the_same_and_training_is_left_alone(runs, held_out):
    path = f"validation.path={held_out}"
    runs.train("alone", *VALIDATED, path)
    runs.train("two", *VALIDATED, path, ranks=2)
    runs.train("without")
    alone, two = validations(runs, "alone"), validations(runs, "two")
    assert alone.keys() == two.keys() == {4, 8}
    bands = {f"val_loss_t{t}" for t in (125, 375, 625, 875)}
    for step, found in alone.items():
        assert {"val_loss", "val_mse", "val_vb"} | bands == {key for key in found if key.startswith("val")}
        assert found["val_loss"] == pytest.approx(sum(found[band] for band in bands) / 4, rel=1e-6)
        for key in found.keys() - {"time"}:
            assert two[step][key] == pytest.approx(found[key], rel=1e-5), key
    assert runs.losses("alone") == runs.losses("without")


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, 0, torch.device("cpu"))
    dist.destroy_process_group()


def test_known_answer(runs, held_out, alone):
    """A network that predicts no noise has the mean square of the noise as its loss."""
    config = load_config(runs.config, [*VALIDATED, f"validation.path={held_out}", "model.learn_sigma=false"])
    encoders = load_encoders(config, alone.device, torch.float32)
    inputs = InputMaker(config, alone.device, *encoders, build(config.diffusion, config.model.learn_sigma))
    validation = Validation(config, alone, 2, inputs)
    seen = []

    def network(x, t, **conditioning):
        seen.extend(t.tolist())
        return torch.zeros_like(x)

    found = validation.run(network)
    noise = randomness.normal(config.seed, "validation noise", torch.arange(16), (3, 16, 16)).double()
    assert found["val_loss"] == pytest.approx(noise.pow(2).mean().item(), rel=1e-6)
    assert found["val_loss_t375"] == pytest.approx(noise[1::4].pow(2).mean().item(), rel=1e-6)
    assert sorted(seen) == sorted([125, 375, 625, 875] * 4)


def test_bands_are_seen_at_their_middles():
    assert band_middles(1000, 8).tolist() == [62, 187, 312, 437, 562, 687, 812, 937]
    assert band_middles(10, 10).tolist() == list(range(10))


def test_data_that_is_not_held_out_or_too_small_is_refused(runs, held_out, shapes_data):
    with pytest.raises(ConfigError, match="give a folder of held-out samples"):
        load_config(runs.config, [*VALIDATED, f"validation.path={shapes_data}"])
    output = runs.train("small", f"validation.path={held_out}", "validation.every.steps=4", code=2)
    assert "2048, rounded up to batches of 8, is too many" in output
