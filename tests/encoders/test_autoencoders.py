"""Autoencoders saved on the spot in diffusers' own formats, and read back by the real code."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dico_t2i.config import AutoencoderConfig
from dico_t2i.encoders import load_autoencoder, sample_latents

WEIGHTS = "diffusion_pytorch_model.safetensors"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count: int = 3, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def save_kl(folder: Path, widths: tuple[int, ...] = (4, 4, 4, 4), **settings: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        **{"norm_num_groups": 2, "layers_per_block": 1, "latent_channels": 4, **settings},
    )
    model.save_pretrained(folder)
    return model.eval()


def save_tiny(folder: Path) -> Any:
    from diffusers import AutoencoderTiny

    widths, blocks = (4, 4, 4, 4), (1, 1, 1, 1)
    model = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    )
    model.save_pretrained(folder)
    return model.eval()


def load(folder: Path, kind: str = "kl", **settings: Any) -> Any:
    return load_autoencoder(AutoencoderConfig.model_validate({"kind": kind, "path": str(folder), **settings}), "cpu")


@pytest.fixture(scope="module")
def kl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("models") / "kl"
    return folder, save_kl(folder)


@torch.no_grad()
def test_kl_is_the_saved_model(kl: tuple[Path, Any]) -> None:
    folder, model = kl
    autoencoder, pixels = load(folder), images()
    assert (autoencoder.latent_channels, autoencoder.downscale, autoencoder.scale) == (4, 8, 0.18215)
    moments = autoencoder.moments(pixels)
    posterior = model.encode(pixels.float() / 127.5 - 1).latent_dist
    assert moments.shape == (3, 8, 4, 4)
    torch.testing.assert_close(moments, torch.cat((posterior.mean, posterior.logvar), 1))

    noise = normal(3, 4, 4, 4)
    latents = autoencoder.latents(moments, noise)
    torch.testing.assert_close(latents, (posterior.mean + posterior.std * noise) * 0.18215)
    expected = (127.5 * model.decode(latents / 0.18215).sample + 128).clamp(0, 255).to(torch.uint8)
    assert (autoencoder.decode(latents).int() - expected.int()).abs().max() <= 1  # a rounding apart


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False},
        {"latent_channels": 2, "layers_per_block": 2, "in_channels": 3},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_is_that_of_diffusers_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    """Without importing diffusers, with widths and other settings that differ."""
    model = save_kl(tmp_path, (4, 8, 8, 16), **settings)
    pixels, latents = images(), normal(3, model.config.latent_channels, 4, 4)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    autoencoder = load_autoencoder(AutoencoderConfig(path=str(tmp_path), scale=1.0), "cpu", dtype)
    model.to(dtype)
    expected = model.encode((pixels.float() / 127.5 - 1).to(dtype)).latent_dist.parameters
    assert torch.equal(autoencoder.moments(pixels), expected.float())
    assert torch.equal(autoencoder._decode(latents.to(dtype)), model.decode(latents.to(dtype)).sample)


@torch.no_grad()
def test_kl_with_other_blocks_is_computed_by_diffusers(tmp_path: Path) -> None:
    model = save_kl(tmp_path, act_fn="gelu")
    expected = model.encode(images().float() / 127.5 - 1).latent_dist.parameters
    autoencoder, latents = load(tmp_path), normal(3, 4, 4, 4)
    torch.testing.assert_close(autoencoder.moments(images()), expected)
    torch.testing.assert_close(autoencoder._decode(latents), model.decode(latents).sample)


@torch.no_grad()
def test_tiny_is_the_saved_model_and_has_no_noise(tmp_path: Path) -> None:
    model, pixels = save_tiny(tmp_path), images()
    autoencoder = load(tmp_path, "tiny", scale=1.0)
    assert (autoencoder.latent_channels, autoencoder.downscale, autoencoder.scale) == (4, 8, 1.0)
    expected = model.encode(pixels.float() / 127.5 - 1).latents
    moments = autoencoder.moments(pixels)
    assert moments.shape == (3, 8, 4, 4)
    torch.testing.assert_close(autoencoder.latents(moments, 3 * normal(3, 4, 4, 4)), expected)
    decoded = (127.5 * model.decode(expected).sample + 128).clamp(0, 255).to(torch.uint8)
    assert (autoencoder.decode(expected).int() - decoded.int()).abs().max() <= 1


def test_pixels_survive_the_round_trip() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    autoencoder = load_autoencoder(AutoencoderConfig(kind="pixels"), "cpu", torch.bfloat16)
    assert (autoencoder.latent_channels, autoencoder.downscale, autoencoder.scale) == (3, 1, 1.0)
    latents = autoencoder.latents(autoencoder.moments(every), normal(2, 3, 16, 16))
    torch.testing.assert_close(latents, every / 127.5 - 1, atol=1e-5, rtol=0)
    assert torch.equal(autoencoder.decode(latents), every)


def test_draws_have_the_moments_asked_for() -> None:
    logvar = torch.tensor([-2.0, 0.0, 1.5])
    mean = torch.tensor([0.5, -1.0, 2.0])
    moments = torch.cat((mean, logvar))[None, :, None, None].expand(1, 6, 200, 200)
    draws = sample_latents(moments, normal(1, 3, 200, 200), 0.5).double()
    deviation = (0.5 * logvar).exp() * 0.5
    # 40,000 draws: the mean's standard error is deviation / 200, the deviation's about deviation / 283.
    assert ((draws.mean((0, 2, 3)) - mean * 0.5).abs() < 4 * deviation / 200).all()
    assert ((draws.std((0, 2, 3)) / deviation - 1).abs() < 4 / 283).all()


def test_draws_are_float32_and_bounded() -> None:
    moments = torch.tensor([0.0, 0.0, -100.0, 100.0]).reshape(1, 4, 1, 1)
    draws = sample_latents(moments.half(), torch.ones(1, 2, 1, 1), 1.0).flatten()
    assert draws.dtype == torch.float32
    torch.testing.assert_close(draws, torch.tensor([-15.0, 10.0]).exp())


def test_decoding_in_chunks_changes_nothing(kl: tuple[Path, Any]) -> None:
    autoencoder, latents = load(kl[0]), normal(5, 4, 2, 2)
    whole = autoencoder.decode(latents, chunk=5)
    assert whole.shape == (5, 3, 16, 16)
    for chunk in (1, 2):
        assert (autoencoder.decode(latents, chunk).int() - whole.int()).abs().max() <= 1
    assert whole.float().std() > 1


def test_decoded_values_are_clamped_and_truncated() -> None:
    autoencoder = load_autoencoder(AutoencoderConfig(kind="pixels"), "cpu")
    latents = torch.tensor([-2.0, 2.0, 0.0]).reshape(1, 3, 1, 1)
    assert autoencoder.decode(latents).flatten().tolist() == [0, 255, 128]
    assert autoencoder.decode(torch.full((1, 3, 1, 1), 0.0078)).flatten().tolist() == [128] * 3  # 128.99


def test_nothing_is_trainable(kl: tuple[Path, Any]) -> None:
    autoencoder = load(kl[0])
    assert not autoencoder.moments(images(1)).requires_grad
    assert not autoencoder.decode(normal(1, 4, 2, 2).requires_grad_()).requires_grad
    assert not autoencoder._model.training
    assert not any(weight.requires_grad for weight in autoencoder._model.parameters())


def test_bfloat16_runs_and_stays_near(kl: tuple[Path, Any]) -> None:
    full = load(kl[0]).moments(images())
    config = AutoencoderConfig(path=str(kl[0]))
    half = load_autoencoder(config, torch.device("cpu"), torch.bfloat16).moments(images())
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(1, 3, 32, 32), "uint8"),
        (torch.zeros(1, 1, 32, 32, dtype=torch.uint8), r"\(N, 3, H, W\)"),
        (torch.zeros(1, 3, 32, 36, dtype=torch.uint8), "not divisible by 8"),
    ],
)
def test_unfit_images_are_refused(kl: tuple[Path, Any], bad: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(kl[0]).moments(bad)


def test_identity_follows_weights_config_scale_and_kind(tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    save_kl(folder)
    first = load(folder).identity()
    assert first == load(folder).identity()
    assert first["kind"] == "kl"
    assert first["name"] == "vae"
    assert load(folder, scale=0.23010).identity() == {**first, "scale": "0.2301"}

    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "_diffusers_version": "0.1"}))
    assert load(folder).identity() == first
    (folder / "config.json").write_text(json.dumps({**settings, "sample_size": 512}))
    assert {k for k, v in load(folder).identity().items() if v != first[k]} == {"config"}

    state = load_file(folder / WEIGHTS)
    state["encoder.conv_in.bias"] += 1e-3
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))
    assert {k for k, v in load(folder).identity().items() if v != first[k]} == {"weights"}
    assert load_autoencoder(AutoencoderConfig(kind="pixels"), "cpu").identity() == {"kind": "pixels", "scale": "1.0"}


def test_older_files_load_the_same(kl: tuple[Path, Any], tmp_path: Path) -> None:
    """The released autoencoder names its attention as diffusers once did, and also comes as .bin."""
    folder, model = kl
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, weight in model.state_dict().items():
        for new_part, old_part in names.items():
            name = name.replace(new_part, old_part)
        old[name] = weight.clone()
    assert set(old) != set(model.state_dict())
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(old, tmp_path / "diffusion_pytorch_model.bin")
    assert torch.equal(load(tmp_path).moments(images()), load(folder).moments(images()))


def test_unfit_folders_are_refused(kl: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"autoencoder\.kind: tiny needs AutoencoderTiny.*AutoencoderKL"):
        load(kl[0], "tiny")

    save_kl(tmp_path / "shallow", (4, 4, 4))
    with pytest.raises(ValueError, match="by a factor of 4, but 8 is needed"):
        load(tmp_path / "shallow")

    folder = tmp_path / "vae"
    save_kl(folder)
    state = load_file(folder / WEIGHTS)
    del state["encoder.conv_in.bias"]
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"vae: lacks encoder\.conv_in\.bias"):
        load(folder)

    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{WEIGHTS}: cannot be loaded"):
        load(folder)


def save_chain(folder: Path, channels: int = 5, pool: bool = True) -> tuple[Any, Any]:
    """A small TAESD in its own files, with widths of 8, written as plain torch modules; the encoder and the decoder."""

    class Block(nn.Module):
        def __init__(self, pooled: bool) -> None:
            super().__init__()
            convolutions = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)]
            self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])
            branch = (nn.Conv2d(8, 16, 1, bias=False), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 8, 1, bias=False))
            self.pool = nn.Sequential(*branch) if pooled else None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.pool(x) if self.pool is not None else x
            return (self.conv(x) + x).relu()

    class Clamp(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x / 3) * 3

    torch.manual_seed(0)
    down, up = [nn.Conv2d(3, 8, 3, padding=1), Block(False)], [Clamp(), nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU()]
    for stage in range(3):
        down += [nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), Block(pool and stage == 2)]
        up += [Block(pool and stage == 0), nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1, bias=False)]
    encoder = nn.Sequential(*down, nn.Conv2d(8, channels, 3, padding=1))
    decoder = nn.Sequential(*up, Block(False), nn.Conv2d(8, 3, 3, padding=1))
    folder.mkdir(exist_ok=True)
    for net, name in ((encoder, "taef2_encoder"), (decoder, "taef2_decoder")):
        save_file(net.state_dict(), folder / f"{name}.safetensors")
    return encoder, decoder


@torch.no_grad()
@pytest.mark.parametrize("pool", [True, False])
def test_taesds_own_files_give_the_saved_networks(tmp_path: Path, pool: bool) -> None:
    encoder, decoder = save_chain(tmp_path, pool=pool)
    autoencoder, pixels = load(tmp_path, "tiny"), images()
    assert (autoencoder.latent_channels, autoencoder.downscale, autoencoder.scale) == (5, 8, 1.0)
    expected = encoder(pixels.float() / 255)
    torch.testing.assert_close(autoencoder.mean_latents(pixels), expected, rtol=1e-4, atol=1e-4)
    decoded = (255 * decoder(expected) + 0.5).clamp(0, 255).to(torch.uint8)
    assert (autoencoder.decode(expected).int() - decoded.int()).abs().max() <= 1


def test_mean_and_scale_may_differ_between_channels(tmp_path: Path) -> None:
    save_chain(tmp_path)
    plain, numbers = load(tmp_path, "tiny"), {"scale": [1.0, 2, 3, 4, 5], "mean": [0.0, 1, 2, 3, -4]}
    scaled, pixels = load(tmp_path, "tiny", **numbers), images()
    scale, mean = (torch.tensor(numbers[key]).float()[:, None, None] for key in ("scale", "mean"))
    latents = scaled.mean_latents(pixels)
    torch.testing.assert_close(latents, (plain.mean_latents(pixels) - mean) * scale)
    torch.testing.assert_close(
        scaled.latents(scaled.moments(pixels), normal(3, 5, 4, 4)), latents, rtol=1e-4, atol=1e-4
    )
    assert (scaled.decode(latents).int() - plain.decode(plain.mean_latents(pixels)).int()).abs().max() <= 1
    assert scaled.identity()["scale"] == "(1.0, 2.0, 3.0, 4.0, 5.0), mean (0.0, 1.0, 2.0, 3.0, -4.0)"
    with pytest.raises(ValueError, match=r"autoencoder\.scale: 2 numbers, but the latents have 5 channels"):
        load(tmp_path, "tiny", scale=[1.0, 2.0])


def test_other_files_are_not_taken_for_taesds(kl: tuple[Path, Any], tmp_path: Path) -> None:
    for part in ("encoder", "decoder"):
        save_file(
            {"0.weight": torch.zeros(8, 4, 3, 3), "1.weight": torch.zeros(4, 8, 3, 3)}, tmp_path / f"{part}.safetensors"
        )
    with pytest.raises(ValueError, match=r"encoder\.safetensors: it does not hold the encoder of a TAESD"):
        load(tmp_path, "tiny")
    with pytest.raises(ValueError, match=r"no usable copy"):
        load(tmp_path)  # of kind kl


REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "taef2"


@pytest.mark.skipif(not REAL.is_dir(), reason="the weights of taef2 are not here")
def test_the_pretrained_taef2_reproduces_a_picture() -> None:
    ramp = torch.linspace(0, 255, 64)
    picture = torch.stack((ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.full((64, 64), 90.0)))
    pixels, autoencoder = picture.to(torch.uint8)[None], load(REAL, "tiny")
    assert (autoencoder.latent_channels, autoencoder.downscale) == (32, 8)
    error = autoencoder.decode(autoencoder.mean_latents(pixels)).double() - pixels
    assert 10 * torch.log10(255**2 / error.square().mean()) > 28  # PSNR in dB
