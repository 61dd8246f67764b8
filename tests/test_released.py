"""Released checkpoints as folders of ours, and classes by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dico_t2i import cli
from dico_t2i.config import DiTConfig, load_config
from dico_t2i.config.networks import DiMConfig, DiSConfig
from dico_t2i.export.released import variant_name
from dico_t2i.models import VARIANTS, DiCo, DiCoConfig
from dico_t2i.models.official import infer_config, load_official_state_dict, official_key, official_shape
from dico_t2i.sampling.labels import class_names, class_number
from tests.models import test_peers
from tests.models.test_official import released_state
from tests.small_models import save_autoencoder

SMALL = DiCoConfig(hidden_size=8, depths=(1, 1, 1, 1, 1), mlp_ratio=2.0)


def dico(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variant_is_told_by_the_shapes(variant):
    with torch.device("meta"):
        model = DiCo(DiCoConfig(variant=variant))
        state = {official_key(n): torch.empty(official_shape(n, p.shape)) for n, p in model.named_parameters()}
    assert variant_name(infer_config(state)) == variant


def test_the_variant_is_told_by_the_release_s_own_list_of_shapes():
    lists = sorted(Path(__file__).resolve().parents[2].glob("shared/golden/state_dict_DiCo-*.json"))
    if not lists:
        pytest.skip("the lists of the released state dicts are not here")
    for path in lists:
        entries = json.loads(path.read_text())
        state = {name: torch.empty(shape, device="meta") for name, shape in shapes(entries)}
        assert variant_name(infer_config(state)) == path.stem.removeprefix("state_dict_")


def shapes(entries):
    """Names and shapes, whichever way the list has them."""
    items = entries.items() if isinstance(entries, dict) else ((entry[0], entry[1]) for entry in entries)
    return [(name, value["shape"] if isinstance(value, dict) else value) for name, value in items]


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_released_file_becomes_a_folder_that_samples(tmp_path, kind):
    state = released_state(SMALL)
    file = tmp_path / f"DiCo.{kind}"
    if kind == "pt":
        torch.save({"ema": state, "model": {name: torch.zeros_like(v) for name, v in state.items()}}, file)
    else:
        save_file(state, file)
    vae = save_autoencoder(tmp_path / "vae")
    out = tmp_path / "folder"
    assert dico("import-official", file, "--out", out, "--autoencoder", vae) == 0
    model = DiCo(SMALL)
    load_official_state_dict(model, state)
    ours = load_file(out / "model.safetensors")
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(ours[name], weight) for name, weight in model.state_dict().items())
    if kind == "pt":
        sample = ("--steps", "2", "--out", tmp_path / "images", "--labels", "golden retriever", "207")
        assert dico("sample", "--checkpoint", out, *sample) == 0
        images = [np.asarray(Image.open(tmp_path / "images" / f"{n:05d}.png")) for n in (0, 1)]
        assert images[0].shape == (256, 256, 3)


def test_a_released_dit_is_told_by_its_keys_and_samples(tmp_path, capsys):
    file, out = tmp_path / "DiT-S-2.pt", tmp_path / "folder"
    torch.save(test_peers.released_state(DiTConfig(variant="DiT-S/2"), side=16), file)
    vae = save_autoencoder(tmp_path / "vae")
    assert dico("import-official", file, "--out", out, "--autoencoder", vae, "--image-size", "512") == 2
    assert "give --image-size 256" in capsys.readouterr().err
    assert not out.exists()
    assert dico("import-official", file, "--out", out, "--autoencoder", vae) == 0
    assert "DiT-S/2 in" in capsys.readouterr().out
    config = load_config(out / "config.yaml")
    assert (config.name, config.model) == ("dit-s-2-256", DiTConfig(variant="DiT-S/2"))
    card = (out / "README.md").read_text()
    assert "A peer of DiCo" in card
    assert "| width, blocks, heads, patch | 384, 12, 6, 2 |" in card
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.yaml",
        "export.json",
        "model.safetensors",
        "vae",
    ]
    sample = ("--steps", "2", "--out", tmp_path / "images", "--labels", "golden retriever", "--fast")
    assert dico("sample", "--checkpoint", out, *sample) == 0
    assert np.asarray(Image.open(tmp_path / "images" / "00000.png")).std() > 1


@pytest.mark.parametrize("kind", ["dis", "dim"])
def test_released_peers_are_told_by_their_keys(tmp_path, capsys, kind):
    """Of a size without a name; their schedule and sampler are in the folder's config."""
    sizes = {"hidden_size": 16, "depth": 3 if kind == "dim" else 2, "num_classes": 1000, "latent_size": 32}
    model = test_peers.randomized({"dis": DiSConfig, "dim": DiMConfig}[kind](**sizes))
    file, out = tmp_path / "weights.pt", tmp_path / "folder"
    torch.save({"ema": model.state_dict()}, file)
    vae = save_autoencoder(tmp_path / "vae")
    assert dico("import-official", file, "--out", out, "--autoencoder", vae, "--image-size", "512") == 2
    assert "give --image-size 256" in capsys.readouterr().err
    assert dico("import-official", file, "--out", out, "--autoencoder", vae) == 0
    ours, config = load_file(out / "model.safetensors"), load_config(out / "config.yaml")
    assert all(torch.equal(ours[name], weight) for name, weight in model.state_dict().items())
    assert config.model == model.config
    assert config.diffusion.schedule == ("scaled_linear" if kind == "dim" else "linear")
    assert config.sampler.guidance_channels == ("three" if kind == "dis" else "all")
    assert "| width, blocks, patch | 16, " in (out / "README.md").read_text()
    sample = ("--steps", "2", "--out", tmp_path / "images", "--labels", "golden retriever", "--fast")
    assert dico("sample", "--checkpoint", out, *sample) == 0
    broken = {name: weight for name, weight in model.state_dict().items() if "conv1d.bias" not in name}
    torch.save(broken, file)
    assert dico("import-official", file, "--out", tmp_path / "other") == 2
    assert "missing" in capsys.readouterr().err


def test_what_is_no_released_file_is_refused(tmp_path, capsys):
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"step": 3, "args": {"lr": 1.0}}, tmp_path / "nothing.pt")
    for name, message in (
        ("missing.pt", "no such file"),
        ("text.pt", "cannot be read safely|can be read safely"),
        ("other.pt", "not a released DiCo"),
        ("list.pt", "holds a list"),
        ("nothing.pt", "holds no state dict"),
    ):
        assert dico("import-official", tmp_path / name, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert any(part in error for part in message.split("|")), error
    assert not (tmp_path / "out").exists()


def test_classes_by_name():
    assert len(class_names()) == len(set(class_names())) == 1000
    assert [class_number(text) for text in ("golden retriever", "Golden_Retriever", "207", "tench")] == [
        207,
        207,
        207,
        0,
    ]
    with pytest.raises(ValueError, match=r"several classes; did you mean crane bird \(134\), crane \(517\)"):
        class_number("crane")
    with pytest.raises(ValueError, match=r"several classes; .*638.*639"):
        class_number("maillot")
    with pytest.raises(ValueError, match=r"not a class of ImageNet; did you mean golden retriever \(207\)"):
        class_number("golden retreiver")
    with pytest.raises(ValueError, match=r"labrador.*Labrador retriever \(208\)"):
        class_number("labrador")
    with pytest.raises(ValueError, match="give its number"):
        class_number("xyzzyq")
