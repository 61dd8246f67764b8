"""Image encoders saved on the spot in the libraries' own formats, and seeded ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dico_t2i.config import VisionEncoderConfig
from dico_t2i.encoders import MissingModelError, VisionEncoder, load_vision_encoder
from tests.encoders.test_autoencoders import save_chain

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SIZE = 28
DINO = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 7}


def load(**changes: Any) -> VisionEncoder:
    return load_vision_encoder(VisionEncoderConfig.model_validate({"image_size": SIZE, **changes}), "cpu")


def save(model: Any, folder: Path) -> Path:
    """A model of transformers with its preprocessing."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3)  # the usual start is so small that errors would hide
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    return save(Dinov2Model(Dinov2Config(**DINO, image_size=56)), tmp_path_factory.mktemp("vision") / "dinov2")


@pytest.fixture(scope="module")
def timm_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As timm's hub folders are."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 7, "reg_tokens": 3}
    model = timm.create_model("vit_tiny_patch16_224", img_size=56, **sizes)
    folder = tmp_path_factory.mktemp("vision") / "vit"
    folder.mkdir()
    state = {name: torch.randn_like(weight) * 0.3 for name, weight in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    settings = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 1000,
        "model_args": {**sizes, "img_size": 56},
        "pretrained_cfg": {"mean": MEAN, "std": STD, "input_size": [3, 56, 56], "classifier": "head"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def images(size: int = SIZE) -> Tensor:
    return torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def test_patches_of_dinov2_are_its_own(dinov2: Path) -> None:
    from transformers import Dinov2Model

    encoder = load(model=str(dinov2))
    found = encoder.encode(images())
    assert encoder.grid == (4, 4)
    assert encoder.width == 16
    plain = Dinov2Model.from_pretrained(dinov2)(normalised(images())).last_hidden_state
    assert torch.equal(found, plain[:, 1:].reshape(2, 4, 4, 16))
    assert "pretrained" in encoder.description


def test_images_are_resized(dinov2: Path) -> None:
    encoder = load(model=str(dinov2))
    small = F.interpolate(images(64).float(), (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 255)
    difference = encoder.encode(images(64)) - encoder.encode(small.round().to(torch.uint8))
    assert difference.abs().max() < 0.1  # of rounding to whole grey levels
    assert (encoder.encode(images(64)) - encoder.encode(images())).abs().max() > 0.5


def test_patches_of_timm_are_its_own(timm_vit: Path) -> None:
    import timm

    encoder = load(kind="timm", model=str(timm_vit), image_size=56)
    found = encoder.encode(images(56))
    assert encoder.grid == (8, 8)
    plain = timm.create_model(f"local-dir:{timm_vit}", pretrained=True, num_classes=0).eval()
    tokens = plain.forward_features(normalised(images(56)))
    assert tokens.shape[1] == 1 + 3 + 64  # class token and registers come first
    assert torch.equal(found, tokens[:, 4:].reshape(2, 8, 8, 16))
    assert load(kind="timm", model=str(timm_vit)).grid == (4, 4)  # position embeddings are resized


def test_clip_and_a_cnn(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel, ConvNextConfig, ConvNextModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=56, patch_size=7))
    encoder = load(model=str(save(clip, tmp_path / "clip")))
    assert encoder.grid == (4, 4)
    assert encoder.width == 16
    cnn = ConvNextModel(ConvNextConfig(hidden_sizes=[4, 6, 8, 10], depths=[1, 1, 1, 1]))
    encoder = load(model=str(save(cnn, tmp_path / "cnn")), image_size=64)
    assert encoder.grid == (2, 2)
    assert encoder.width == 10
    plain = ConvNextModel.from_pretrained(tmp_path / "cnn")(normalised(images(64))).last_hidden_state
    assert torch.equal(encoder.encode(images(64)), plain.permute(0, 2, 3, 1))


def test_a_tiny_autoencoder_gives_its_latents(tmp_path: Path) -> None:
    network, _ = save_chain(tmp_path, channels=5)
    encoder = load(kind="tiny", model=str(tmp_path), image_size=32)
    assert (encoder.grid, encoder.width) == ((4, 4), 5)
    with torch.no_grad():
        plain = network(images(32).float() / 255)
    torch.testing.assert_close(encoder.encode(images(32)), plain.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="tiny has no seeded form"):
        load(kind="tiny", weights="seeded")


@pytest.mark.parametrize("kind", ["transformers", "timm"])
def test_seeded(kind: str) -> None:
    state = torch.get_rng_state()
    seeded = {"width": 16, "layers": 1, "heads": 2, "seed": 3}
    encoder = load(kind=kind, weights="seeded", seeded=seeded)
    assert torch.equal(torch.get_rng_state(), state)
    again = load(kind=kind, weights="seeded", seeded=seeded)
    other = load(kind=kind, weights="seeded", seeded={**seeded, "seed": 4})
    assert encoder.grid == (2, 2)
    assert torch.equal(encoder.encode(images()), again.encode(images()))
    assert not torch.equal(encoder.encode(images()), other.encode(images()))
    assert "seeded" in encoder.description


def test_what_is_not_there_or_does_not_fit_is_told(dinov2: Path, timm_vit: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingModelError, match=r"alignment.encoder.model: no usable copy of '/none'"):
        load(model="/none")
    with pytest.raises(ValueError, match=r"alignment.encoder.image_size"):
        load(model=str(dinov2), image_size=3)
    (tmp_path / "config.json").write_text('{"architecture": "no_such_net"}')
    (tmp_path / "model.safetensors").write_bytes((timm_vit / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="'no_such_net', which this version of timm does not have"):
        load(kind="timm", model=str(tmp_path))
    (tmp_path / "config.json").write_text((timm_vit / "config.json").read_text())
    with pytest.raises(ValueError, match="download it again"):
        load(kind="timm", model=str(tmp_path))
    with pytest.raises(ValueError, match="not divisible by heads"):
        load(weights="seeded", seeded={"width": 10, "heads": 3})
