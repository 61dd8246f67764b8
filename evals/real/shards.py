"""Reads whole sets of small images into memory: pixels, classes, and what the samples' json says."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dico_t2i.data.decode import IMAGE_EXTENSIONS, decode_image
from dico_t2i.data.errors import DataError
from dico_t2i.data.index import load_index
from dico_t2i.data.reader import ShardReader


@dataclass(frozen=True)
class Images:
    """images: (N, 3, size, size) uint8. labels: (N,) int64, -1 without a class. about: the json of each sample.

    content: the hash of the index's content, for protocols.
    """

    images: Tensor
    labels: Tensor
    about: list[dict[str, Any]]
    content: str

    def class_names(self) -> list[str]:
        """The name of each class, by its number, from the field "class" of the json. Raises DataError without it."""
        names = {int(label): entry.get("class") for label, entry in zip(self.labels, self.about, strict=True)}
        if sorted(names) != list(range(len(names))) or not all(isinstance(name, str) for name in names.values()):
            raise DataError("the samples need classes from 0 on, and a field 'class' with their names")
        return [str(names[number]) for number in range(len(names))]


def read_images(folder: Path, size: int, most: int | None = None) -> Images:
    """Read a folder of image shards, in order, at most ``most`` samples. Raises DataError or SampleError."""
    index = load_index(folder)
    if index.kind != "images":
        raise DataError(f"{folder}: it contains {index.kind}, expected images")
    reader, images, labels, about = ShardReader(index), list[Tensor](), list[int](), list[dict[str, Any]]()
    places = ((shard, member) for shard in range(len(index.names)) for member in range(int(index.samples[shard])))
    for number, (shard, member) in enumerate(places):
        if number == most:
            break
        sample = reader.read(shard, member)
        data = next(sample[name] for name in IMAGE_EXTENSIONS if name in sample)
        images.append(decode_image(data, size, "center"))
        labels.append(int(sample.get("cls", b"-1")))
        about.append(json.loads(sample.get("json", b"{}")))
    reader.close()
    return Images(torch.stack(images), torch.tensor(labels), about, str(index.meta.get("content", "")))
