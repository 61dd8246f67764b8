"""A small convolutional classifier of 32-pixel images, which judges generated ones: its network, file and features."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dico_t2i.encoders.local import file_hash, reading

SIZE = 32
_BATCH = 500
_ABOUT = "classifier"


class Residual(nn.Module):
    """Two convolutions whose sum with the input goes on."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Network(nn.Module):
    """Images (N, 3, 32, 32), normalised, to logits (N, classes); 112 million multiply-accumulates at width 40."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        stages: list[nn.Module] = [_convolution(3, width), nn.MaxPool2d(2)]
        for channels in (width, 2 * width, 4 * width):
            stages += [_convolution(channels, 2 * channels), Residual(2 * channels), nn.MaxPool2d(2)]
        self.stages = nn.Sequential(*stages[:-1])
        self.head = nn.Linear(8 * width, classes, bias=False)

    def features(self, x: Tensor) -> Tensor:
        """The features before the last layer, (N, 8 width)."""
        return F.adaptive_max_pool2d(self.stages(x), 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return 0.125 * self.head(self.features(x))


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.CELU(0.3))


@dataclass(frozen=True)
class Classifier:
    """A trained network. names: of its classes. accuracy: on the test split. sha256: of its file."""

    network: Network
    mean: Tensor
    deviation: Tensor
    names: Sequence[str]
    accuracy: float
    sha256: str

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The classes (N,) int64 and the features (N, D) of images (N, 3, H, W) uint8 of any size."""
        found = [self._of_chunk(chunk) for chunk in images.split(_BATCH)]
        classes, features = (torch.cat(parts) for parts in zip(*found, strict=True))
        return classes, features

    def _of_chunk(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return recognise(self.network, normalised(images, self.mean, self.deviation))


def recognise(network: Network, x: Tensor) -> tuple[Tensor, Tensor]:
    """The classes (N,) and features (N, D) of normalised images (N, 3, H, W).

    They are means over four views: the image and its mirror image, each moved by a pixel to the upper left and to the
    lower right, with reflected edges.
    """
    wide = F.pad(x, (1, 1, 1, 1), mode="reflect")
    moved = (wide[..., :-2, :-2], wide[..., 2:, 2:])
    views = [view.contiguous(memory_format=torch.channels_last) for each in moved for view in (each, each.flip(-1))]
    features = torch.stack([network.features(view) for view in views]).mean(0)
    return network.head(features).argmax(dim=1), features


def normalised(images: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Images (N, 3, H, W) uint8 as the network takes them: 32 pixels, less the mean, by the deviation of a channel."""
    x = images.float() / 255
    if x.shape[-1] != SIZE:
        x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return ((x - mean[:, None, None]) / deviation[:, None, None]).contiguous(memory_format=torch.channels_last)


def save_classifier(
    path: Path, network: Network, mean: Tensor, deviation: Tensor, names: Sequence[str], accuracy: float
) -> None:
    """Write a classifier as safetensors, with what it needs in the metadata."""
    from safetensors.torch import save_file

    about = {"names": list(names), "accuracy": accuracy, "width": network.head.in_features // 8}
    tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    # One entry of metadata: several would be written in a random order, and change the file's hash.
    save_file({**tensors, "mean": mean, "deviation": deviation}, path, {_ABOUT: json.dumps(about)})


def load_classifier(path: Path) -> Classifier:
    """Read a classifier. Raises ValueError, with the path, if the file is missing or is not one."""
    from safetensors import safe_open

    if not path.is_file():
        raise ValueError(f"--classifier {path}: no such file; train one with evals/train_classifier.py")
    try:
        with reading(path), safe_open(path, "pt") as file:
            about = json.loads(file.metadata()[_ABOUT])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            mean, deviation, names = tensors.pop("mean"), tensors.pop("deviation"), about["names"]
            network = Network(len(names), about["width"])
            network.load_state_dict(tensors)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: it is not a file of evals/train_classifier.py: {error!r}") from None
    network = network.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return Classifier(network, mean, deviation, names, about["accuracy"], file_hash(path))
