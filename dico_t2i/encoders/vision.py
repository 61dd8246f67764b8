"""Frozen image encoders that give features of image patches: ViTs and CNNs of transformers or timm, TAESD's encoders.

Preprocessing is the encoder's own except for the size: images are already squares and are resized to ``image_size``.
"""

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dico_t2i.config import VisionEncoderConfig
from dico_t2i.encoders import taesd
from dico_t2i.encoders.local import load_transformers, read_json, reading, resolve

_FILES = {
    "transformers": (("config.json",), ("model.safetensors", "pytorch_model.bin"), ("preprocessor_config.json",)),
    "timm": (("config.json",), ("model.safetensors",)),
    "tiny": taesd.FILES[:1],
}
_PATCH = 14  # pixels of a patch of a seeded encoder
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's mean and standard deviation of pixels


class VisionEncoder:
    """A frozen image encoder.

    grid: rows and columns of patches. width: D, the size of a patch's features. description: one line to print with
    results.
    """

    def __init__(self, config: VisionEncoderConfig, net: "_Net", device: torch.device, dtype: torch.dtype) -> None:
        self._size, self._device, self._dtype = config.image_size, device, dtype
        self._net, self.description = net, net.description
        net.module.to(device, dtype).eval().requires_grad_(False)
        self._mean, self._std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (net.mean, net.std))
        try:
            probe = self.encode(torch.zeros(1, 3, self._size, self._size, dtype=torch.uint8))
        except (ValueError, RuntimeError, AssertionError) as error:  # raised by the library
            raise ValueError(
                f"alignment.encoder: {config.model} cannot process images of {self._size} pixels; try a different"
                f" alignment.encoder.image_size: {error}"
            ) from error
        self.grid, self.width = (probe.shape[1], probe.shape[2]), probe.shape[3]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Features of the last layer: (N, 3, H, W) uint8 on any device -> (N, rows, columns, D) in its dtype."""
        pixels = images.to(self._device, non_blocking=True).float() / 255
        if pixels.shape[2:] != (self._size, self._size):
            pixels = F.interpolate(pixels, (self._size, self._size), mode="bicubic", antialias=True).clamp(0, 1)
        return self._net.patches(((pixels - self._mean) / self._std).to(self._dtype))


class _Net(NamedTuple):
    """A loaded encoder.

    forward maps pixels to tokens (N, T, D), with the patches last, or to a map (N, D, h, w) or (N, h, w, D). rows is
    the number of rows of patches if it returns tokens.
    """

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    width: int
    rows: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    description: str

    def patches(self, pixels: Tensor) -> Tensor:
        """Features of the patches: (N, 3, S, S) -> (N, rows, columns, D)."""
        output = self.forward(pixels)
        if output.ndim == 4:
            return output.permute(0, 2, 3, 1) if output.shape[1] == self.width else output
        # Class and register tokens come before the patches.
        return output[:, -(self.rows**2) :].unflatten(1, (self.rows, self.rows))


def load_vision_encoder(
    config: VisionEncoderConfig, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> VisionEncoder:
    """The image encoder of a config, in eval mode.

    Raises MissingModelError, before any slow import, if its files cannot be found, and ValueError if they do not fit.
    """
    if config.weights == "seeded":
        net = _seeded(config)
    else:
        net = {"transformers": _of_transformers, "timm": _of_timm, "tiny": _of_tiny}[config.kind](config)
    return VisionEncoder(config, net, torch.device(device), dtype)


def find_vision_encoder(config: VisionEncoderConfig) -> list[Path]:
    """The files of the model; none for a seeded one. Raises MissingModelError if one cannot be found."""
    if config.weights == "seeded":
        return []
    return resolve(config.model, _FILES[config.kind], "alignment.encoder.model")


def _of_transformers(config: VisionEncoderConfig) -> _Net:
    _, weights, preprocessing = find_vision_encoder(config)
    pixels = read_json(preprocessing)
    import transformers

    module = load_transformers(transformers.AutoModel, weights.parent, weights)
    module = getattr(module, "vision_model", module)  # CLIP and SigLIP hold it in this attribute
    mean, std = (tuple(pixels.get(key, default)) for key, default in (("image_mean", _MEAN), ("image_std", _STD)))
    return _transformers_net(module, config, mean, std, f"pretrained {config.model} (transformers)")


def _transformers_net(
    module: Any, config: VisionEncoderConfig, mean: tuple[float, ...], std: tuple[float, ...], description: str
) -> _Net:
    settings = module.config
    width = getattr(settings, "hidden_size", None) or settings.hidden_sizes[-1]
    rows = config.image_size // getattr(settings, "patch_size", config.image_size)
    # DINOv2 interpolates its position embedding by itself.
    interpolates = "interpolate_pos_encoding" in signature(module.forward).parameters
    options = {"interpolate_pos_encoding": True} if interpolates else {}
    return _Net(module, lambda x: module(x, **options).last_hidden_state, width, rows, mean, std, description)


def _of_timm(config: VisionEncoderConfig) -> _Net:
    settings_file, weights = find_vision_encoder(config)
    import timm

    name = read_json(settings_file).get("architecture", "")
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if known is None:
        raise ValueError(
            f"alignment.encoder.model: {settings_file} describes {name!r}, which this version of timm does not have"
        )
    options = {"img_size": config.image_size} if known.fixed_input_size else {}  # resizes position embeddings
    with reading(weights):
        module = timm.create_model(f"local-dir:{weights.parent}", pretrained=True, num_classes=0, **options)
    pixels = timm.data.resolve_model_data_config(module)
    return _timm_net(module, pixels["mean"], pixels["std"], f"pretrained {config.model} (timm {name})")


def _timm_net(module: Any, mean: tuple[float, ...], std: tuple[float, ...], description: str) -> _Net:
    rows = module.patch_embed.grid_size[0] if hasattr(module, "num_prefix_tokens") else 0
    return _Net(module, module.forward_features, module.num_features, rows, mean, std, description)


def _of_tiny(config: VisionEncoderConfig) -> _Net:
    """The latents themselves, of images in 0..1, one position for 8x8 pixels."""
    (file,) = find_vision_encoder(config)
    module, width, _ = taesd.read_encoder(file)
    return _Net(module, module, width, 0, (0.0,) * 3, (1.0,) * 3, f"pretrained {config.model} (tiny autoencoder)")


def _seeded(config: VisionEncoderConfig) -> _Net:
    size = config.seeded
    if size.width % size.heads:
        raise ValueError(f"alignment.encoder.seeded: width {size.width} is not divisible by heads {size.heads}")
    text = f"width {size.width}, {size.layers} layers, {size.heads} heads, seed {size.seed}"
    description = f"seeded (random, untrained) image encoder: {text}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(size.seed)
        if config.kind == "timm":
            return _timm_net(_seeded_timm(config), _MEAN, _STD, description)
        return _transformers_net(_seeded_dinov2(config), config, _MEAN, _STD, description)


def _seeded_timm(config: VisionEncoderConfig) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    size = config.seeded
    return VisionTransformer(
        img_size=config.image_size,
        patch_size=_PATCH,
        embed_dim=size.width,
        depth=size.layers,
        num_heads=size.heads,
        num_classes=0,
    )


def _seeded_dinov2(config: VisionEncoderConfig) -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    size = config.seeded
    settings = Dinov2Config(
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        image_size=config.image_size,
        patch_size=_PATCH,
    )
    return Dinov2Model(settings)
