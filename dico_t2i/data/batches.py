"""Makes endless micro-batches from any step on; global batches are the same for any number of ranks and workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dico_t2i import randomness
from dico_t2i.config import DataConfig
from dico_t2i.data.choice import choose_captions
from dico_t2i.data.decode import IMAGE_EXTENSIONS, check_finite, decode_array, decode_image
from dico_t2i.data.errors import DataError, QuarantinedError, SampleError
from dico_t2i.data.index import DatasetIndex
from dico_t2i.data.order import SampleOrder
from dico_t2i.data.reader import ShardReader
from dico_t2i.data.sample import POOLED, TEXT, Caption, label_of, member_of, sourced_captions, stored_features
from dico_t2i.data.shard import MOMENTS

MAX_REPLACEMENTS = 100  # tried in a row for one position


_SMALL_TENSOR = 1 << 16  # bytes


class BadSample(NamedTuple):
    """A sample that was replaced: the position that needed it, and the reason why it cannot be used."""

    position: int
    shard: str
    key: str
    reason: str


@dataclass
class Batch:
    """A micro-batch of n samples, in CPU memory.

    positions: int64 (n,). images: uint8 (n, 3, H, W), or moments: float16 (n, 2C, h, w). A network conditioned on text
    gets captions and tokens (the tokenizer's output), or text float16 (n, T, dim) and pooled (n, pooled_dim) instead of
    tokens if these features are stored with the samples. A network conditioned on classes gets labels int64 (n,).
    sources: int64 (n,), the data set of a mixture that each sample is from. bad: the samples that were replaced.
    quarantined: the number of further samples that were replaced because they are on the quarantine list.
    """

    positions: Tensor
    keys: list[str]
    images: Tensor | None = None
    moments: Tensor | None = None
    captions: list[str] | None = None
    labels: Tensor | None = None
    tokens: Tensor | None = None
    text: Tensor | None = None
    pooled: Tensor | None = None
    sources: Tensor | None = None
    bad: list[BadSample] = field(default_factory=list)
    quarantined: int = 0

    def pin_memory(self) -> Batch:
        """A copy whose tensors are in page-locked memory; the DataLoader calls it."""
        pinned = {name: v.pin_memory() for name, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(**{**vars(self), **pinned})

    def __getstate__(self) -> dict[str, Any]:
        """The state that a worker sends: small tensors directly, because shared memory costs a connection each."""
        return {
            name: value.numpy() if isinstance(value, Tensor) and value.nbytes <= _SMALL_TENSOR else value
            for name, value in vars(self).items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in state.items()})


@dataclass
class MicroBatches(IterableDataset[Batch]):
    """Worker w of n makes micro-batches w, w + n, ...; the DataLoader takes them from the workers in turn."""

    samples: Samples
    positions_of: Callable[[int], np.ndarray]
    micro_batch: int
    per_step: int
    start_step: int

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in count(first, stride):
            yield self.samples.batch(self.positions(number))

    def step(self, number: int) -> int:
        """The step that micro-batch ``number`` belongs to; numbers count from 0 at ``start_step``."""
        return self.start_step + number // self.per_step

    def positions(self, number: int) -> np.ndarray:
        low = number % self.per_step * self.micro_batch
        return self.positions_of(self.step(number))[low : low + self.micro_batch]

    def shards(self, number: int) -> list[str]:
        """Names of the shards that a micro-batch is read from."""
        shards, _ = self.samples.order.locate(self.positions(number))
        return [self.samples.reader.index.names[shard] for shard in np.unique(shards).tolist()]


class _Sample(NamedTuple):
    key: str
    pixels: Any  # an image, uint8 (3, H, W) tensor, or moments, float16 array
    captions: list[Caption]
    label: int
    features: tuple[np.ndarray, ...]  # text and pooled features of each caption, if they are stored


@dataclass
class _Tally:
    """The samples that were replaced in a micro-batch."""

    bad: list[BadSample] = field(default_factory=list)
    quarantined: int = 0


class Wanted(NamedTuple):
    """The parts of a sample that are needed besides its pixels.

    classes: a sample whose label is this number or higher is bad. tokenize: maps captions to token ids, if needed.
    """

    condition: Literal["class", "text"]
    classes: int | None = None
    tokenize: Callable[[list[str]], Tensor] | None = None


@dataclass
class Samples:
    """Turns positions into a batch."""

    data: DataConfig
    reader: ShardReader
    order: SampleOrder
    seed: int
    wanted: Wanted
    shapes: dict[int | None, tuple[int, ...]]  # by bucket: of images in pixels, or of stored moments
    first_position: int = 0  # of the order, in the run

    def batch(self, positions: np.ndarray) -> Batch:
        index = torch.from_numpy(positions + self.first_position)
        flips = [False] * len(positions)
        if self.data.flip:
            flips = (randomness.uniform(self.seed, "flip", index) < 0.5).tolist()
        shards, members = (values.tolist() for values in self.order.locate(positions))
        bucket, tally = self.order.bucket(int(positions[0])), _Tally()
        places = zip(positions.tolist(), shards, members, flips, strict=True)
        samples = [self._usable(*place, bucket, tally) for place in places]
        batch = Batch(index, [sample.key for sample in samples], bad=tally.bad, quarantined=tally.quarantined)
        if self.reader.index.kind == "images":
            batch.images = torch.stack([sample.pixels for sample in samples])
        else:
            batch.moments = torch.from_numpy(np.stack([sample.pixels for sample in samples]))
        sources = self.order.sources(positions)
        batch.sources = None if sources is None else torch.from_numpy(sources)
        if self.wanted.condition == "class":
            batch.labels = torch.tensor([sample.label for sample in samples])
        else:
            self._add_text(batch, samples)
        return batch

    def _add_text(self, batch: Batch, samples: list[_Sample]) -> None:
        """Add the caption chosen for each sample, and its tokens or features."""
        choices = choose_captions(self.data, self.seed, batch.positions, [sample.captions for sample in samples])
        batch.captions = [sample.captions[choice].text for sample, choice in zip(samples, choices, strict=True)]
        if self.data.cached_text:
            rows = [[part[choice] for part in s.features] for s, choice in zip(samples, choices, strict=True)]
            batch.text, batch.pooled = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        elif self.wanted.tokenize:
            batch.tokens = self.wanted.tokenize(batch.captions)

    def _usable(self, position: int, shard: int, member: int, flip: bool, bucket: int | None, tally: _Tally) -> _Sample:
        """The sample of a position, or the first of its replacements that can be used.

        Replacements whose shard is known to be lost are skipped without a report.
        """
        names = self.reader.index.names
        for attempt in range(1, MAX_REPLACEMENTS + 2):
            if attempt == 1 or not self.reader.is_lost(shard):
                try:
                    return self._load(shard, member, flip, bucket, patient=attempt == 1)
                except SampleError as error:
                    last = error
                if isinstance(last, QuarantinedError):
                    tally.quarantined += attempt == 1
                else:
                    tally.bad.append(BadSample(position + self.first_position, names[shard], last.key, last.reason))
            shard, member = self.order.replacement(position, attempt)
        raise DataError(
            f"{self.reader.index.location}/{last.shard}: more than {MAX_REPLACEMENTS} bad samples in a row,"
            f" the last: {last.key!r}, {last.reason}; check the data with data_prep/verify.py"
        )

    def _load(self, shard: int, member: int, flip: bool, bucket: int | None, patient: bool) -> _Sample:
        sample = self.reader.read(shard, member, patient, bucket)
        key = sample["__key__"]
        try:
            captions = sourced_captions(sample) if self.wanted.condition == "text" else []
            label = label_of(sample, self.wanted.classes) if self.wanted.condition == "class" else -1
            features = stored_features(sample, len(captions)) if self.data.cached_text else ()
            return _Sample(key, self._pixels(sample, flip, bucket), captions, label, features)
        except SampleError as error:
            raise SampleError(self.reader.index.names[shard], key, error.reason) from None

    def _pixels(self, sample: dict[str, Any], flip: bool, bucket: int | None) -> Tensor | np.ndarray:
        shape = self.shapes[bucket]
        if self.reader.index.kind == "latents":
            moments = decode_array(member_of(sample, MOMENTS), shape, "moments")
            moments = moments[int(flip)] if moments.ndim == 4 else moments
            check_finite(moments, "moments")
            return moments
        image = decode_image(member_of(sample, *IMAGE_EXTENSIONS), (shape[0], shape[1]), self.data.crop)
        return image.flip(-1) if flip else image


def wanted_extensions(data: DataConfig, index: DatasetIndex, condition: str) -> set[str]:
    """The extensions of the members that are read of each sample."""
    pixels = {MOMENTS} if index.kind == "latents" else set(IMAGE_EXTENSIONS)
    features = {TEXT, POOLED} if data.cached_text else set()
    return pixels | features | ({"cls"} if condition == "class" else {"json", "txt"})


def pixel_shapes(data: DataConfig, index: DatasetIndex) -> dict[int | None, tuple[int, ...]]:
    """The size of images in pixels, or the shape of stored moments, by bucket; the key is None without buckets.

    Raises DataError if the index does not describe its latents, or if they were made with a different image size or
    crop than the config's.
    """
    square = (data.image_size, data.image_size)
    sizes: dict[int | None, tuple[int, ...]] = dict(enumerate(index.buckets)) if data.buckets else {None: square}
    if index.kind == "images":
        return sizes
    channels, size = _latent_meta(data, index)
    mirrored = (2,) if index.meta.get("mirrored") else ()
    return {
        bucket: (*mirrored, 2 * channels, *(side * size // data.image_size for side in sides))
        for bucket, sides in sizes.items()
    }


def _latent_meta(data: DataConfig, index: DatasetIndex) -> tuple[int, int]:
    """The channels of the latents, and the height and width of the latents of a square image."""
    path, meta = f"{index.location}/index.json", index.meta
    try:
        channels, size = int(meta["latent_channels"]), int(meta["latent_size"])
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{path}: latent_channels and latent_size are missing; encode the data again with data_prep/latents.py"
        ) from None
    for name in ("image_size", "crop"):
        if meta.get(name) != getattr(data, name):
            raise DataError(
                f"{path}: latents were made with {name}: {meta.get(name)}, but the config has"
                f" data.{name}: {getattr(data, name)}; change the config, or encode the data again"
            )
    return channels, size
