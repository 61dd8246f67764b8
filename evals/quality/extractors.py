"""Networks whose features are compared (the FID Inception, CLIP, DINOv2), and the resize to their input.

An image is an (H, W, 3) uint8 array; all results are float32 on the host, with one row per image.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dico_t2i.encoders.local import file_hash, reading, resolve
from evals.quality.features import CLIP, DINO, LOGITS, POOL, POOL_DIMENSION, SPATIAL, SPATIAL_DIMENSION
from evals.quality.protocol import TORCHSCRIPT, Extractor, Resize
from evals.quality.weights import Weights

Image = NDArray[np.uint8]


_SIZE = 299
_CLASSES = 1008


class Features(Protocol):
    """A network that computes features. identity: what they depend on. outputs: their names and dimensions."""

    identity: dict[str, str]
    outputs: dict[str, int]

    def __call__(self, images: Sequence[Image]) -> dict[str, Tensor]: ...


class Scorer(Protocol):
    """A network that compares images with their captions. identity: what its scores depend on."""

    identity: dict[str, str]

    def __call__(self, images: Sequence[Image], captions: Sequence[str]) -> dict[str, Tensor]: ...


def load_inception(settings: Extractor, weights: Weights, device: torch.device) -> Features:
    """Load the FID Inception of a protocol. Raises ValueError, with the path, for a file that does not contain it."""
    if settings.file == TORCHSCRIPT and weights.path:
        return ScriptedInception(settings.resize, weights, device)
    return Inception(settings.resize, weights, device)


class Inception:
    """The network of a state dict: pooled features (2048), spatial features of sFID (2023), logits without bias (1008).

    Spatial features are the first 7 channels after the first branch of the seventh mixed block ("mixed_6/conv" of the
    original graph), row by row, channels last, as in ADM's evaluator.
    """

    def __init__(self, resize: Resize, weights: Weights, device: torch.device) -> None:
        self.outputs = {POOL: POOL_DIMENSION, SPATIAL: SPATIAL_DIMENSION, LOGITS: _CLASSES}
        self.resize, self.device = resize, device
        self.identity = {"network": "FID Inception 2015-12-05", "sha256": weights.sha256, "resize": resize}
        net = seeded_inception() if weights.path is None else _read_inception(weights.path)
        self._net = net.to(device).eval().requires_grad_(False)
        self._spatial: list[Tensor] = []
        net.get_submodule("Mixed_6d.branch1x1").register_forward_hook(lambda _m, _x, out: self._spatial.append(out))

    @torch.no_grad()
    def __call__(self, images: Sequence[Image]) -> dict[str, Tensor]:
        self._spatial.clear()
        x = scale_pixels(resize_images(images, self.resize).to(self.device), self.resize)
        pool = _pooled(self._net, x)
        spatial = self._spatial.pop()[:, :7].permute(0, 2, 3, 1).flatten(1)
        logits = pool @ self._net.get_submodule("fc").weight.T  # type: ignore[operator]
        return {POOL: pool.cpu(), SPATIAL: spatial.cpu(), LOGITS: logits.cpu()}


class ScriptedInception:
    """clean-fid's own network, from its TorchScript file: pooled features (2048)."""

    def __init__(self, resize: Resize, weights: Weights, device: torch.device) -> None:
        self.outputs = {POOL: POOL_DIMENSION}
        assert weights.path is not None
        from cleanfid.inception_torchscript import InceptionV3W

        self.resize, self.device = resize, device
        self.identity = {"network": "FID Inception 2015-12-05, TorchScript", "sha256": weights.sha256, "resize": resize}
        folder = _folder_with(weights.path)
        with reading(weights.path):
            net = InceptionV3W(str(folder), download=False, resize_inside=resize == "legacy_tensorflow")
        self._net = net.to(device).eval()

    @torch.no_grad()
    def __call__(self, images: Sequence[Image]) -> dict[str, Tensor]:
        if self.resize == "legacy_tensorflow":  # the script contains this resize
            pool = torch.cat([self._net(_to_tensor(image)[None].to(self.device)) for image in images])
        else:
            pool = self._net(resize_images(images, self.resize).to(self.device))
        return {POOL: pool.float().cpu()}


class DinoFeatures:
    """DINOv2's class token, for FD-DINOv2 (Stein et al. 2023): bicubic to 224 px, ImageNet's mean and deviation."""

    def __init__(self, name: str, device: torch.device) -> None:
        settings, weights = resolve(name, [("config.json",), ("model.safetensors",)], "--dinov2")
        import transformers

        with reading(weights):
            net = transformers.Dinov2Model.from_pretrained(settings.parent, local_files_only=True)
        self._net, self.device = net.to(device).eval().requires_grad_(False), device
        self.identity = {"network": f"DINOv2 {Path(name).name}", "sha256": file_hash(weights)}
        self.outputs = {DINO: int(net.config.hidden_size)}

    @torch.no_grad()
    def __call__(self, images: Sequence[Image]) -> dict[str, Tensor]:
        x = torch.stack([torch.from_numpy(_resize_clean(image, 224)) for image in images]).permute(0, 3, 1, 2) / 255
        mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return {DINO: self._net(((x - mean) / deviation).to(self.device)).pooler_output.float().cpu()}


class ClipScorer:
    """100 times the cosine between an image and its caption, by open_clip with its own preprocessing."""

    def __init__(self, name: str, device: torch.device) -> None:
        card, weights = resolve(
            name,
            [("open_clip_config.json",), ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")],
            "--clip",
        )
        import open_clip

        place = f"local-dir:{card.parent}"
        with reading(weights):
            net, self._prepare = open_clip.create_model_from_pretrained(place)
        self._net, self.device = net.to(device).eval().requires_grad_(False), device
        self._tokenize = open_clip.get_tokenizer(place)
        self.identity = {"network": f"CLIP {Path(name).name}", "sha256": file_hash(weights)}

    @torch.no_grad()
    def __call__(self, images: Sequence[Image], captions: Sequence[str]) -> dict[str, Tensor]:
        """The scores, (N,)."""
        from PIL import Image as Pil

        pixels = torch.stack([self._prepare(Pil.fromarray(image)) for image in images]).to(self.device)
        image = self._net.encode_image(pixels, normalize=True)
        text = self._net.encode_text(self._tokenize(list(captions)).to(self.device), normalize=True)
        return {CLIP: 100 * (image * text).sum(dim=1).float().cpu()}


# By the keys of ``features.Models``: functions that load a network of a hub id or folder to a device.
IMAGE_NETWORKS: dict[str, Callable[[str, torch.device], Features]] = {"dinov2": DinoFeatures}
CAPTION_NETWORKS: dict[str, Callable[[str, torch.device], Scorer]] = {"clip": ClipScorer}


def resize_images(images: Sequence[Image], resize: Resize) -> Tensor:
    """Resize images to (N, 3, 299, 299) float32 in 0..255.

    clean: clean-fid's, antialiased bicubic in float. legacy_pytorch: bilinear with half-pixel centres.
    legacy_tensorflow: TensorFlow 1's bilinear, without aligned corners and without half-pixel centres.
    """
    if resize == "clean":
        return torch.stack([torch.from_numpy(_resize_clean(image, _SIZE)).permute(2, 0, 1) for image in images])
    function = _resize_pytorch if resize == "legacy_pytorch" else _resize_tensorflow
    return torch.cat([function(_to_tensor(image)[None]) for image in images])


def scale_pixels(x: Tensor, resize: Resize) -> Tensor:
    """Scale 0..255 to the network's input: -1..1 in the PyTorch port, (x - 128) / 128 in the original graph."""
    return x / 255 * 2 - 1 if resize == "legacy_pytorch" else (x - 128) / 128


def seeded_inception(seed: int = 0) -> nn.Module:
    """The FID Inception's architecture with random weights (He initialisation), for trying things out."""
    net = _build_inception()
    generator = torch.Generator().manual_seed(seed)
    for weight in net.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, math.sqrt(2 / weight[0].numel()), generator=generator)
    return net


def _build_inception() -> nn.Module:
    """Build torchvision's Inception v3 with the blocks that clean-fid uses for the network of 2015."""
    from cleanfid import inception_pytorch as blocks
    from torchvision.models import Inception3

    net = Inception3(num_classes=_CLASSES, aux_logits=False, init_weights=False)
    for name, width, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        setattr(net, f"Mixed_{name}", blocks.FIDInceptionA(width, pool_features=pool))
    for name, channels in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        setattr(net, f"Mixed_{name}", blocks.FIDInceptionC(768, channels_7x7=channels))
    net.Mixed_7b, net.Mixed_7c = blocks.FIDInceptionE_1(1280), blocks.FIDInceptionE_2(2048)
    return net


def _read_inception(path: Path) -> nn.Module:
    with reading(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        net = _build_inception()
        net.load_state_dict(state)
    return net


def _pooled(net: nn.Module, x: Tensor) -> Tensor:
    """Map (N, 3, 299, 299) to (N, 2048) by all children up to the global pooling, the last one before dropout."""
    for name, layer in net.named_children():
        x = layer(x)
        if name == "avgpool":
            return x.flatten(1)
    raise AssertionError("no avgpool")


def _resize_clean(image: Image, size: int) -> NDArray[np.float32]:
    from cleanfid.resize import make_resizer

    resized: NDArray[np.float32] = make_resizer("PIL", False, "bicubic", (size, size))(image)
    return resized


def _resize_pytorch(x: Tensor) -> Tensor:
    return F.interpolate(x, size=(_SIZE, _SIZE), mode="bilinear", align_corners=False).clamp(0, 255)


def _resize_tensorflow(x: Tensor) -> Tensor:
    rows, columns = (_tensorflow_weights(length) for length in x.shape[-2:])
    return rows @ x @ columns.T


def _tensorflow_weights(length: int) -> Tensor:
    """The weights (299, length): output i lies at i * length / 299 of the input, between two neighbours."""
    position = torch.arange(_SIZE, dtype=torch.float32) * (length / _SIZE)
    low = position.floor().long().clamp(max=length - 1)
    high, share = (low + 1).clamp(max=length - 1), position - low
    weights = torch.zeros(_SIZE, length)
    index = torch.arange(_SIZE)
    weights.index_put_((index, low), 1 - share, accumulate=True)
    weights.index_put_((index, high), share, accumulate=True)
    return weights


def _to_tensor(image: Image) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()


def _folder_with(path: Path) -> Path:
    """The folder of a file, which must have the name that clean-fid reads."""
    if path.name == TORCHSCRIPT:
        return path.parent
    raise ValueError(f"--extractor {path}: rename it to {TORCHSCRIPT}, the name that clean-fid reads")
