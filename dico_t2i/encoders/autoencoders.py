"""The frozen autoencoders between images and latents: a KL autoencoder, a tiny deterministic one, or pixels.

All of them return posterior moments (mean and log-variance), so that caches, training and sampling treat them alike.
The deterministic ones have a log-variance of -30, whose noise is negligible in float32.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dico_t2i.config import MEASURED, AutoencoderConfig, ConfigError
from dico_t2i.data.batches import Batch
from dico_t2i.encoders import taesd
from dico_t2i.encoders.kl import KlNetwork, KlSettings, read_network
from dico_t2i.encoders.local import (
    MissingModelError,
    config_hash,
    file_hash,
    load_diffusers,
    read_json,
    reading,
    resolve,
)
from dico_t2i.randomness import normal
from dico_t2i.remote import base_name

_FILES = (("config.json",), ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"))
_NO_NOISE = -30.0  # log-variance
DECODE_CHUNK = 16  # images decoded at a time, which limits memory


def find_autoencoder(config: AutoencoderConfig) -> list[Path]:
    """The files of the model; none for pixels. Raises MissingModelError if one cannot be found.

    A tiny autoencoder is a folder of diffusers, or TAESD's own files of encoder and decoder.
    """
    if config.kind == "pixels":
        return []
    try:
        return resolve(config.path, _FILES, "autoencoder.path")
    except MissingModelError:
        if config.kind == "tiny":
            with suppress(MissingModelError):
                return resolve(config.path, taesd.FILES, "autoencoder.path")
        raise


def sample_latents(moments: Tensor, noise: Tensor, scale: float | Tensor, shift: float | Tensor = 0.0) -> Tensor:
    """Scaled draws from the posterior: (mean + exp(logvar / 2) noise - shift) scale, with logvar clamped to -30..20.

    moments: (N, 2C, h, w), mean then log-variance, fresh or cached, any float dtype. noise: (N, C, h, w)
    standard normal. scale, shift: a number, or (C, 1, 1). Returns (N, C, h, w) float32.
    """
    mean, logvar = moments.float().chunk(2, dim=1)
    return (mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise.float() - shift) * scale


def scale_text(scale: object, mean: object) -> str:
    """Scale and mean as an identity records them: the mean appears if it is not 0."""
    return f"{scale}, mean {mean}" if mean else str(scale)


def to_uint8(images: Tensor) -> Tensor:
    """Convert float32 images in -1..1 of any shape to uint8: 127.5 x + 128, clamped and truncated as in the release."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


class Autoencoder(ABC):
    """Base class of the autoencoders, which are frozen and record no gradients.

    latent_channels: C. downscale: the ratio of image size to latent size. scale: the factor between the autoencoder's
    latents, less their mean, and the network's input; mean and scale are numbers, or one for each channel.
    """

    def __init__(
        self,
        latent_channels: int,
        downscale: int,
        config: AutoencoderConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Raises ConfigError if scale or mean do not have one number for each channel, or are not measured yet."""
        if config.scale == MEASURED:
            raise ConfigError(
                "autoencoder.scale: measured stands for the numbers that data_prep/latents.py stores with latents;"
                " train on such latents"
            )
        self.latent_channels = latent_channels
        self.downscale = downscale
        self.scale, self.mean = config.scale, config.mean or 0.0
        self.device = device
        self.dtype = dtype
        self._scale, self._shift = (self._per_channel(key) for key in ("scale", "mean"))

    def _per_channel(self, key: str) -> Tensor:
        """A number, or numbers of the channels as (C, 1, 1), on the device."""
        values = torch.tensor(getattr(self, key), device=self.device)
        if values.ndim and len(values) != self.latent_channels:
            raise ConfigError(
                f"autoencoder.{key}: {len(values)} numbers, but the latents have {self.latent_channels} channels"
            )
        return values.reshape(-1, 1, 1) if values.ndim else values

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Posterior moments of images: (N, 3, H, W) uint8 -> (N, 2C, H/downscale, W/downscale) float32, unscaled.

        Raises ValueError for other dtypes and shapes.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected (N, 3, H, W) uint8, found {tuple(images.shape)} {images.dtype}")
        if images.shape[2] % self.downscale or images.shape[3] % self.downscale:
            raise ValueError(
                f"images: {images.shape[2]}x{images.shape[3]} pixels are not divisible by {self.downscale};"
                " resize or crop them"
            )
        return self._encode((images.to(self.device).float() / 127.5 - 1).to(self.dtype)).float()

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """``sample_latents`` with this autoencoder's scale and mean."""
        return sample_latents(moments, noise, self._scale, self._shift)

    def mean_latents(self, images: Tensor) -> Tensor:
        """The posterior means of images, scaled: (N, 3, H, W) uint8 -> (N, C, h, w) float32."""
        return (self.moments(images).chunk(2, dim=1)[0] - self._shift) * self._scale

    def of_batch(self, batch: Batch, position: Tensor, seed: int) -> Tensor:
        """Scaled latents (N, C, h, w), float32, of a micro-batch's images or cached moments, on the encoder's device.

        position: (N,) int64, the samples' positions; the draw from the posterior is a function of them and the seed.
        """
        if batch.moments is not None:
            moments = batch.moments.to(self.device, non_blocking=True)
        else:
            assert batch.images is not None
            moments = self.moments(batch.images.to(self.device, non_blocking=True))
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        return self.latents(moments, normal(seed, "latent", position, shape))

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk: int = DECODE_CHUNK) -> Tensor:
        """Decode scaled latents to images, ``chunk`` at a time.

        (N, C, h, w) -> (N, 3, H, W) uint8, on the autoencoder's device.
        """
        return torch.cat([self._decode_chunk(part) for part in latents.split(chunk)])

    def _decode_chunk(self, latents: Tensor) -> Tensor:
        unscaled = latents.to(self.device).float() / self._scale + self._shift
        return to_uint8(self._decode(unscaled.to(self.dtype)).float())

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """Everything that cached moments depend on; equal for the same weights, config, name and scale."""

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor:
        """Encode (N, 3, H, W) in -1..1 to moments (N, 2C, h, w)."""

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents (N, C, h, w) to images (N, 3, H, W) in about -1..1."""


class PixelAutoencoder(Autoencoder):
    """The identity: the network sees images in -1..1. The scale is 1, whatever the config says.

    It works in float32, since bfloat16 would save nothing and change values by up to a quarter of a grey level.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(3, 1, AutoencoderConfig(kind="pixels"), device, torch.float32)

    def identity(self) -> dict[str, str]:
        return {"kind": "pixels", "scale": "1.0"}

    def _encode(self, images: Tensor) -> Tensor:
        return _without_noise(images)

    def _decode(self, latents: Tensor) -> Tensor:
        return latents


class DiffusersAutoencoder(Autoencoder):
    """An autoencoder from a folder in diffusers' format; by default it is computed by diffusers as well."""

    class_name: str

    def __init__(self, config: AutoencoderConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._kind, self._name = config.kind, base_name(config.path)
        self._settings_file, self._weights_file = find_autoencoder(config)
        self._model = self._load(dtype).to(device)
        downscale = 2 ** (len(self._widths()) - 1)
        _check_downscale(config.path, downscale)
        super().__init__(self._model.config.latent_channels, downscale, config, device, dtype)

    def identity(self) -> dict[str, str]:
        return {
            "kind": self._kind,
            "name": self._name,
            "weights": file_hash(self._weights_file),
            "config": config_hash(read_json(self._settings_file)),
            "scale": scale_text(self.scale, self.mean),
        }

    def save(self, folder: Path) -> None:
        """Write the model to its own folder, in the format that it was read from."""
        self._of_diffusers(self.dtype).save_pretrained(folder)

    def _load(self, dtype: torch.dtype) -> Any:
        saved_as = read_json(self._settings_file).get("_class_name")
        if saved_as != self.class_name:
            raise ValueError(
                f"autoencoder.kind: {self._kind} needs {self.class_name}, but {self._settings_file} has {saved_as}"
            )
        return self._read(dtype)

    def _read(self, dtype: torch.dtype) -> Any:
        """The network with its weights, frozen."""
        return self._of_diffusers(dtype)

    def _of_diffusers(self, dtype: torch.dtype) -> Any:
        import diffusers

        with reading(self._weights_file):
            return load_diffusers(
                getattr(diffusers, self.class_name),
                self._settings_file.parent,
                dtype,
                use_safetensors=self._weights_file.suffix == ".safetensors",
                local_files_only=True,
            )

    def _widths(self) -> Sequence[int]:
        """The channels of the encoder at each resolution."""
        return self._model.config.block_out_channels

    def _decode(self, latents: Tensor) -> Tensor:
        return self._model.decode(latents).sample


class KlAutoencoder(DiffusersAutoencoder):
    """Stable Diffusion's autoencoder, such as sd-vae-ft-ema."""

    class_name = "AutoencoderKL"

    def _read(self, dtype: torch.dtype) -> Any:
        settings = KlSettings.of(read_json(self._settings_file))
        return read_network(settings, self._weights_file, dtype) if settings else self._of_diffusers(dtype)

    def _encode(self, images: Tensor) -> Tensor:
        if isinstance(self._model, KlNetwork):
            return self._model.encode(images)
        return self._model.encode(images).latent_dist.parameters

    def _decode(self, latents: Tensor) -> Tensor:
        return self._model.decode(latents) if isinstance(self._model, KlNetwork) else super()._decode(latents)


class TinyAutoencoder(DiffusersAutoencoder):
    """A distilled, deterministic autoencoder, such as taesd. Its latents are already scaled, so scale is usually 1."""

    class_name = "AutoencoderTiny"

    def _widths(self) -> Sequence[int]:
        return self._model.config.encoder_block_out_channels

    def _encode(self, images: Tensor) -> Tensor:
        return _without_noise(self._model.encode(images).latents)


class ChainAutoencoder(Autoencoder):
    """A tiny autoencoder in TAESD's own files, such as FLUX.2's (taef2), which diffusers has no class for."""

    def __init__(self, config: AutoencoderConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._name = base_name(config.path)
        self._files = find_autoencoder(config)
        encoder, channels, downscale = taesd.read_encoder(self._files[0])
        networks = (encoder, taesd.read_decoder(self._files[1]))
        self._encoder, self._decoder = (net.to(device, dtype).eval().requires_grad_(False) for net in networks)
        for net in (self._encoder, self._decoder):
            net.to(memory_format=torch.channels_last)  # CPUs take a third of the time in bf16
        _check_downscale(config.path, downscale)
        super().__init__(channels, downscale, config, device, dtype)

    def identity(self) -> dict[str, str]:
        hashes = dict(zip(("weights", "decoder"), map(file_hash, self._files), strict=True))
        return {"kind": "tiny", "name": self._name, **hashes, "scale": scale_text(self.scale, self.mean)}

    def _encode(self, images: Tensor) -> Tensor:
        return _without_noise(self._encoder((images + 1) / 2))

    def _decode(self, latents: Tensor) -> Tensor:
        return 2 * self._decoder(latents) - 1


def load_autoencoder(
    config: AutoencoderConfig, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """The autoencoder of a config, in eval mode.

    Raises MissingModelError, before any slow import, if its files cannot be found, and ValueError if they do not
    fit the config.
    """
    device = torch.device(device)
    if config.kind == "pixels":
        return PixelAutoencoder(device)
    if config.kind == "tiny" and find_autoencoder(config)[0].name != _FILES[0][0]:
        return ChainAutoencoder(config, device, dtype)
    return (KlAutoencoder if config.kind == "kl" else TinyAutoencoder)(config, device, dtype)


def _check_downscale(path: str, downscale: int) -> None:
    if downscale != 8:
        raise ValueError(f"autoencoder.path: {path} reduces images by a factor of {downscale}, but 8 is needed")


def _without_noise(mean: Tensor) -> Tensor:
    return torch.cat((mean, torch.full_like(mean, _NO_NOISE)), dim=1)
