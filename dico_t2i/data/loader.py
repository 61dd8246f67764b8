"""Micro-batches: endless, from any step on, the same for any number of ranks and workers."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dico_t2i import randomness
from dico_t2i.config import DataConfig
from dico_t2i.data.index import MOMENTS, DataError, DatasetIndex
from dico_t2i.data.order import SampleOrder, rank_positions
from dico_t2i.data.reader import (
    QuarantinedError,
    SampleError,
    ShardReader,
    check_finite,
    decode_array,
    decode_image,
    decode_rows,
)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TEXT, POOLED = "text.npy", "pooled.npy"  # features of each caption: float16 (captions, T, dim), (captions, pooled_dim)
MAX_REPLACEMENTS = 100  # in a row, for one position
PREFETCH = 4  # micro-batches per worker

_MAX_OPEN_SHARDS = 256
_MAX_LABEL_DIGITS = 9
_SMALL_TENSOR = 1 << 16  # bytes
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_ORPHAN_POLL_S = 5.0  # between two looks of a worker at its parent
_POLL_S = 1.0  # between two looks at the workers while a micro-batch is late
_MAX_NAMED_SHARDS = 4


class BadSample(NamedTuple):
    """A sample that was replaced: the position it was wanted for, and what was wrong with it."""

    position: int
    shard: str
    key: str
    reason: str


@dataclass
class Batch:
    """A micro-batch of n samples, at CPU.

    positions: int64 (n,). images: uint8 (n, 3, H, W), or moments: float16 (n, 2C, h, w). captions and tokens
    (what the tokenizer made of them) with texts, labels int64 (n,) with classes. text float16 (n, T, dim) and pooled
    (n, pooled_dim) instead of tokens where the features are stored. sources: int64 (n,), which data set of a mixture
    each is from. bad: the samples replaced; quarantined: how many more were, because of the quarantine list.
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
        """What a worker sends: each tensor through shared memory costs a connection, so small ones go as they are."""
        return {
            name: value.numpy() if isinstance(value, Tensor) and value.nbytes <= _SMALL_TENSOR else value
            for name, value in vars(self).items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in state.items()})


def make_loader(
    data: DataConfig,
    index: DatasetIndex,
    order: SampleOrder,
    *,
    seed: int,
    condition: Literal["class", "text"],
    global_batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    start_step: int,
    tokenize: Callable[[list[str]], Tensor] | None,
    classes: int | None = None,
    retries: int = 0,
    retry_wait_s: float = 0.5,
    timeout_s: float = 0.0,
) -> Iterable[Batch]:
    """Endless micro-batches of a rank: for each step from ``start_step``, its positions in order, cut evenly.

    classes: labels from there on make a sample bad. retries, retry_wait_s: see ShardReader. timeout_s: the longest
    wait for a worker's micro-batch; 0 is for ever.
    Raises DataError if sizes do not divide, or the latents in the index are not those of the config. While
    iterating, raises DataError that names the worker if one died or is late.
    """
    positions_of = partial(rank_positions, global_batch=global_batch, streams=order.streams, rank=rank, world=world)
    per_rank = len(positions_of(start_step))
    if per_rank % micro_batch:
        raise DataError(f"micro-batch {micro_batch} does not divide the {per_rank} samples of a rank and step")
    # A block of a stream spans a few shards; all streams' shards should stay open.
    open_shards = min(_MAX_OPEN_SHARDS, 4 * order.streams // world)
    wanted = _extensions(data, index, condition)
    reader = ShardReader(index, open_shards, retries, retry_wait_s, extensions=wanted, obey_quarantine=True)
    shapes = _shapes(data, index)
    samples = _Samples(data, reader, order, seed, condition, classes, tokenize, shapes)
    plan = _MicroBatches(samples, positions_of, micro_batch, per_rank // micro_batch, start_step)
    if not data.workers:
        return DataLoader(plan, batch_size=None, pin_memory=torch.cuda.is_available())
    loader = DataLoader(
        plan,
        batch_size=None,
        num_workers=data.workers,
        multiprocessing_context="fork",
        prefetch_factor=PREFETCH,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(_set_up_worker, os.getpid()),
        timeout=_POLL_S,
    )
    return _Supervised(loader, plan, rank, timeout_s)


@dataclass
class _MicroBatches(IterableDataset[Batch]):
    """Worker w of n makes micro-batches w, w + n, ...; the DataLoader takes them from the workers in turn."""

    samples: _Samples
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
        """The step that micro-batch ``number``, counted from the first, belongs to."""
        return self.start_step + number // self.per_step

    def positions(self, number: int) -> np.ndarray:
        low = number % self.per_step * self.micro_batch
        return self.positions_of(self.step(number))[low : low + self.micro_batch]

    def shards(self, number: int) -> list[str]:
        """Names of the shards that a micro-batch is read from."""
        shards, _ = self.samples.order.locate(self.positions(number))
        return [self.samples.reader.index.names[shard] for shard in np.unique(shards).tolist()]


@dataclass
class _Supervised(Iterable[Batch]):
    """A DataLoader whose workers are named when they die or are late."""

    loader: DataLoader[Batch]
    plan: _MicroBatches
    rank: int
    timeout_s: float

    def __iter__(self) -> Iterator[Batch]:
        return _Supervision(self)


class _Supervision(Iterator[Batch]):
    def __init__(self, source: _Supervised) -> None:
        self.source, self.plan = source, source.plan
        self.number = 0  # of the micro-batch that is next
        before = signal.getsignal(signal.SIGCHLD)
        # Held back while workers are made: what libraries start in them right after the fork must not take it either.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        self.batches: Any = iter(source.loader)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        if threading.current_thread() is threading.main_thread():
            # torch's own handler would raise in the middle of a step or a save; here a death shows when data are due.
            signal.signal(signal.SIGCHLD, before)

    def __next__(self) -> Batch:
        started = time.monotonic()
        while True:
            try:
                batch = next(self.batches)
            except (RuntimeError, OSError, EOFError) as error:
                self._check_alive(error)
                if not str(error).startswith("DataLoader timed out"):
                    raise
            else:
                self.number += 1
                return batch
            waited = time.monotonic() - started
            if self.source.timeout_s and waited >= self.source.timeout_s:
                worker = self.number % len(self.batches._workers)
                # A stopped process would keep this one from leaving.
                self.batches._workers[worker].kill()
                raise DataError(f"{self._name(worker)} gave no data for {waited:.0f} s; {self._owed(worker)}")

    def _check_alive(self, error: Exception) -> None:
        for worker, process in enumerate(self.batches._workers):
            if process.exitcode is not None:
                message = f"{self._name(worker)} {_ending(process.exitcode)}; {self._owed(worker)}"
                raise DataError(message) from error

    def _name(self, worker: int) -> str:
        return f"data worker {worker} (pid {self.batches._workers[worker].pid}) of rank {self.source.rank}"

    def _owed(self, worker: int) -> str:
        """The step and shards of the micro-batch that a worker has to give next."""
        number = self.number + (worker - self.number) % len(self.batches._workers)
        shards = self.plan.shards(number)
        more = f" and {len(shards) - _MAX_NAMED_SHARDS} more" if len(shards) > _MAX_NAMED_SHARDS else ""
        root = self.plan.samples.reader.index.location
        return f"step {self.plan.step(number)} needs of it {', '.join(shards[:_MAX_NAMED_SHARDS])}{more} in {root}"


def _ending(code: int) -> str:
    if code >= 0:
        return f"left with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


class _Sample(NamedTuple):
    key: str
    pixels: Any  # an image, uint8 (3, H, W) tensor, or moments, float16 array
    captions: list[str]
    label: int
    features: tuple[np.ndarray, ...]  # of each caption: text and pooled, where they are stored


@dataclass
class _Tally:
    """What was replaced in a micro-batch."""

    bad: list[BadSample] = field(default_factory=list)
    quarantined: int = 0


@dataclass
class _Samples:
    """Turns positions into a batch."""

    data: DataConfig
    reader: ShardReader
    order: SampleOrder
    seed: int
    condition: Literal["class", "text"]
    classes: int | None
    tokenize: Callable[[list[str]], Tensor] | None
    shapes: dict[int | None, tuple[int, ...]]  # of images in pixels or of moments as stored, by bucket

    def batch(self, positions: np.ndarray) -> Batch:
        index = torch.from_numpy(positions)
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
        if self.condition == "class":
            batch.labels = torch.tensor([sample.label for sample in samples])
        else:
            self._add_text(batch, samples)
        return batch

    def _add_text(self, batch: Batch, samples: list[_Sample]) -> None:
        """The caption drawn for each sample, and its tokens or features."""
        counts = torch.tensor([len(sample.captions) for sample in samples])
        choices = randomness.integers(self.seed, "caption", batch.positions, counts).tolist()
        batch.captions = [sample.captions[choice] for sample, choice in zip(samples, choices, strict=True)]
        if self.data.cached_text:
            rows = [[part[choice] for part in s.features] for s, choice in zip(samples, choices, strict=True)]
            batch.text, batch.pooled = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        elif self.tokenize:
            batch.tokens = self.tokenize(batch.captions)

    def _usable(self, position: int, shard: int, member: int, flip: bool, bucket: int | None, tally: _Tally) -> _Sample:
        """The sample of a position, or the first of its replacements that can be used.

        Replacements whose shard is known to be lost are passed over in silence.
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
                    tally.bad.append(BadSample(position, names[shard], last.key, last.reason))
            shard, member = self.order.replacement(position, attempt)
        raise DataError(
            f"{self.reader.index.location}/{last.shard}: more than {MAX_REPLACEMENTS} bad samples in a row,"
            f" the last: {last.key!r}, {last.reason}; check the data with data_prep/verify.py"
        )

    def _load(self, shard: int, member: int, flip: bool, bucket: int | None, patient: bool) -> _Sample:
        sample = self.reader.read(shard, member, patient, bucket)
        key = sample["__key__"]
        try:
            captions = captions_of(sample) if self.condition == "text" else []
            label = _label(sample, self.classes) if self.condition == "class" else -1
            features = _features(sample, len(captions)) if self.data.cached_text else ()
            return _Sample(key, self._pixels(sample, flip, bucket), captions, label, features)
        except SampleError as error:
            raise SampleError(self.reader.index.names[shard], key, error.reason) from None

    def _pixels(self, sample: dict[str, Any], flip: bool, bucket: int | None) -> Tensor | np.ndarray:
        shape = self.shapes[bucket]
        if self.reader.index.kind == "latents":
            moments = decode_array(_member(sample, MOMENTS), shape, "moments")
            moments = moments[int(flip)] if moments.ndim == 4 else moments
            check_finite(moments, "moments")
            return moments
        image = decode_image(_member(sample, *IMAGE_EXTENSIONS), (shape[0], shape[1]), self.data.crop)
        return image.flip(-1) if flip else image


def _extensions(data: DataConfig, index: DatasetIndex, condition: str) -> set[str]:
    """The members that are needed of a sample; nothing else is read."""
    pixels = {MOMENTS} if index.kind == "latents" else set(IMAGE_EXTENSIONS)
    features = {TEXT, POOLED} if data.cached_text else set()
    return pixels | features | ({"cls"} if condition == "class" else {"json", "txt"})


def _shapes(data: DataConfig, index: DatasetIndex) -> dict[int | None, tuple[int, ...]]:
    """The size of images in pixels, or the shape of moments as stored, of each bucket; None is without buckets.

    Raises DataError if the index has no buckets, or its latents are not of the config's images.
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
    """Channels of the latents, and the side of those of a square image."""
    path, meta = f"{index.location}/index.json", index.meta
    try:
        channels, size = int(meta["latent_channels"]), int(meta["latent_size"])
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{path}: does not give latent_channels and latent_size; encode again with data_prep/latents.py"
        ) from None
    for name in ("image_size", "crop"):
        if meta.get(name) != getattr(data, name):
            raise DataError(
                f"{path}: latents were made with {name}: {meta.get(name)}, but the config has"
                f" data.{name}: {getattr(data, name)}; change the config or encode again"
            )
    return channels, size


def _member(sample: dict[str, Any], *extensions: str) -> bytes:
    """The first of these members that a sample has. Raises SampleError."""
    for extension in extensions:
        if extension in sample:
            return sample[extension]
    raise SampleError("", "", f"has no {' or '.join(extensions)}")


def captions_of(sample: dict[str, Any]) -> list[str]:
    """The captions in the sample's json that are not blank, or else its txt as one. Raises SampleError if none are."""
    try:
        found = json.loads(sample.get("json", b"{}")).get("captions")
        if found is None:
            found = [_text(_member(sample, "txt"))]
        if not isinstance(found, list):
            raise TypeError("captions is not a list")
        captions = [text if text.isascii() else _well_formed(text) for text in found if text.strip()]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SampleError("", "", f"captions cannot be read: {error}") from None
    if not captions:
        raise SampleError("", "", "has no caption")
    return captions


def _text(data: bytes) -> str:
    """Text in UTF-8 or UTF-16, by their byte order marks if they have any, or else in Windows-1252, Latin-1's superset.

    Raises ValueError for other bytes.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252")
    if _CONTROL.search(text):
        raise ValueError("not text in UTF-8, UTF-16 or Windows-1252")
    return text


def _well_formed(text: str) -> str:
    """The text without lone surrogates, which JSON can hold and no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _features(sample: dict[str, Any], captions: int) -> tuple[np.ndarray, ...]:
    """The stored text features, one row a caption. Raises SampleError."""
    parts = tuple(decode_rows(_member(sample, name), name) for name in (TEXT, POOLED))
    for part, name, axes in zip(parts, (TEXT, POOLED), (3, 2), strict=True):
        if part.ndim != axes or len(part) != captions:
            raise SampleError("", "", f"{name} is of shape {part.shape}, for {captions} captions")
        check_finite(part, name)
    return parts


def _label(sample: dict[str, Any], classes: int | None) -> int:
    """The class in the sample's cls member. Raises SampleError."""
    digits = _member(sample, "cls").strip()
    if not digits.isdigit() or len(digits) > _MAX_LABEL_DIGITS:
        raise SampleError("", "", f"cls is no class number: {digits[:20]!r}")
    if classes is not None and int(digits) >= classes:
        raise SampleError("", "", f"cls is {int(digits)}, but model.num_classes ends at {classes - 1}")
    return int(digits)


def _set_up_worker(parent: int, worker: int) -> None:
    """Leave signals to the training process: its own SIGTERM, sent at its exit, ends a worker, or its death.

    A scheduler signals all processes of a job, and the trainer still wants its data to finish and save.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # SIGTERM is blocked since the fork, in all threads: it reaches nobody but the waiting one.
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: int) -> None:
    """A parent that was killed sends nothing: the worker then has another one."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, _ORPHAN_POLL_S)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
