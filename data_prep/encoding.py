"""Keeps an encoder busy: reads and decodes batches ahead of it, writes in the background, and measures the time."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from dico_t2i.data.decode import IMAGE_EXTENSIONS, decode_image
from dico_t2i.data.errors import DataError, SampleError, ShardError
from dico_t2i.data.index import DatasetIndex
from dico_t2i.data.reader import ShardReader

if TYPE_CHECKING:
    from torch import Tensor

COPIED = ("json", "txt", "cls")  # members that are copied
AHEAD = 4  # batches that are read and decoded ahead of the encoder
BEHIND = 2  # batches that may wait to be written

Shape = Any  # side of a square in pixels, or height and width


class Image(NamedTuple):
    """A decoded image, (3, H, W) uint8, with the members to copy."""

    copied: dict[str, Any]
    pixels: Tensor


@dataclass
class Batch:
    """Images of one shard and one shape.

    samples: their number, with those that are skipped; first, last: whether it is the first, or last, of the shard.
    bucket: the number of the shape, in a data set with buckets.
    """

    shard: int
    bucket: int | None
    samples: int
    first: bool
    last: bool
    images: list[Image] = field(default_factory=list)
    skipped: list[SampleError] = field(default_factory=list)


class Clock:
    """Measures wall time by activity of the encoding thread, and runs the thread that writes."""

    def __init__(self) -> None:
        self.seconds = {"waiting for images": 0.0, "encoding": 0.0, "waiting for the disk": 0.0}
        self._started = time.perf_counter()
        self._thread = ThreadPoolExecutor(1)
        self._behind: deque[Future[None]] = deque()

    @contextmanager
    def measure(self, what: Literal["waiting for images", "encoding", "waiting for the disk"]) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - started

    def in_background(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do the work in the writing thread, after all earlier work. Raises the error of earlier work, if any."""
        with self.measure("waiting for the disk"):
            self._behind.append(self._thread.submit(work, *arguments))
            while len(self._behind) > BEHIND:
                self._behind.popleft().result()

    def finish(self) -> None:
        """Wait until everything is written. Raises the error of the writing thread, if any."""
        with self.measure("waiting for the disk"):
            while self._behind:
                self._behind.popleft().result()

    def close(self) -> None:
        self._thread.shutdown()

    def line(self, samples: int) -> str:
        """A line with the rate and the share of each activity in the time."""
        wall = max(time.perf_counter() - self._started, 1e-9)
        rest = max(0.0, wall - sum(self.seconds.values()))
        parts = {**self.seconds, "the rest": rest}
        shares = ", ".join(f"{what} {seconds / wall:.0%}" for what, seconds in parts.items())
        return f"{samples / wall:.1f} images/s in {wall:.1f} s: {shares}"


def batches_of(
    source: DatasetIndex,
    shards: Sequence[int],
    batch: int,
    size: int,
    crop: Literal["center", "resize"],
) -> Generator[Batch, None, None]:
    """Yield batches of the shards in turn, AHEAD of the consumer; every shard has at least one, which may be empty.

    The division into batches depends on the shard alone, so that the features do, too. Batches contain one bucket each.
    """
    reader = ShardReader(source, obey_quarantine=True)
    plan = (part for shard in shards for part in _plan(source, shard, batch, size))
    with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as decoding:

        def read(shard: int, members: Sequence[int], shape: Shape) -> list[Future[Image] | SampleError]:
            results: list[Future[Image] | SampleError] = []
            for member in members:
                try:
                    sample = reader.read(shard, member)
                except SampleError as error:
                    results.append(error)
                else:
                    results.append(decoding.submit(_decode, source.names[shard], sample, shape, crop))
            return results

        ahead: deque[tuple[Batch, Future[list[Future[Image] | SampleError]]]] = deque()
        try:
            for members, shape, empty in plan:
                ahead.append((empty, reading.submit(read, empty.shard, members, shape)))
                if len(ahead) > AHEAD:
                    yield _filled(*ahead.popleft())
            while ahead:
                yield _filled(*ahead.popleft())
        finally:
            reading.shutdown(cancel_futures=True)
            decoding.shutdown(cancel_futures=True)
            reader.close()


def _plan(source: DatasetIndex, shard: int, batch: int, size: int) -> Iterator[tuple[list[int], Shape, Batch]]:
    """The members of each batch of a shard, the shape of its images, and the batch without its images."""
    members, shapes = np.arange(int(source.samples[shard])), source.meta.get("buckets")
    groups: list[tuple[int | None, np.ndarray]] = [(None, members)]
    if shapes:
        try:
            buckets = source.shard(shard).bucket
        except ShardError as error:
            raise DataError(f"{error}; the index is needed for the buckets of its samples") from None
        if buckets is None:
            raise DataError(f"{source.path(shard)}: its samples have no buckets; assign them again")
        groups = [(number, members[buckets == number]) for number in np.unique(buckets).tolist()]
    parts = [
        (bucket, group[at : at + batch].tolist()) for bucket, group in groups for at in range(0, len(group), batch)
    ] or [(None, [])]
    for number, (bucket, chosen) in enumerate(parts):
        shape = size if bucket is None or not shapes else tuple(shapes[bucket])
        yield chosen, shape, Batch(shard, bucket, len(chosen), number == 0, number == len(parts) - 1)


def _decode(shard: str, sample: dict[str, Any], shape: Shape, crop: Literal["center", "resize"]) -> Image:
    key = str(sample["__key__"])
    data = next((sample[name] for name in IMAGE_EXTENSIONS if name in sample), None)
    if data is None:
        raise SampleError(shard, key, "it has no image")
    try:
        pixels = decode_image(data, shape, crop)
    except SampleError as error:
        raise SampleError(shard, key, error.reason) from None
    return Image({name: sample[name] for name in ("__key__", *COPIED) if name in sample}, pixels)


def _filled(batch: Batch, read: Future[list[Future[Image] | SampleError]]) -> Batch:
    for result in read.result():
        try:
            if isinstance(result, SampleError):
                raise result
            batch.images.append(result.result())
        except SampleError as error:
            batch.skipped.append(error)
    return batch
