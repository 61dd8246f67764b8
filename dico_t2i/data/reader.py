"""Samples by position: checked bytes out of the shards, images and latents out of the bytes."""

from __future__ import annotations

import io
import math
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Collection
from functools import lru_cache
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from dico_t2i.data.index import DataError, DatasetIndex, ShardError, ShardIndex

MAX_PIXELS = 1 << 27
LOOK_AGAIN_S = 60.0  # before a shard that was lost is tried again
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # of the content, whatever the member's name says

_MAX_GAP = 4096  # bytes between the members of a sample that are read along; a tar header takes 512
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class SampleError(DataError):
    """One sample that cannot be used. ``shard`` and ``key`` are empty where only its bytes are known."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}: sample {key!r}: {reason}" if shard else reason)
        self.shard, self.key, self.reason = shard, key, reason


class QuarantinedError(SampleError):
    """A sample that the quarantine list leaves out."""


class _Span(NamedTuple):
    """Where a member of a sample lies in the tar."""

    extension: str
    offset: int
    size: int
    crc32: int


class _Open:
    """A shard that is being read, and where the members that are wanted lie in it."""

    def __init__(self, file: BinaryIO, table: ShardIndex, wanted: Collection[str] | None) -> None:
        self.file, self.table = file, table
        columns = [c for c, name in enumerate(table.extensions) if wanted is None or name in wanted]
        self._names = [table.extensions[column] for column in columns]
        self._spans = np.stack((table.offsets, table.sizes, table.crc32), axis=-1)[:, columns]
        self._rows: dict[int, np.ndarray] = {}  # of each bucket asked for

    def spans(self, row: int) -> list[_Span]:
        """Where the wanted members of a sample lie."""
        found = zip(self._names, self._spans[row].tolist(), strict=True)
        return [_Span(name, *span) for name, span in found if span[0] >= 0]

    def row(self, member: int, bucket: int | None) -> int:
        """The row in the table of a member of the shard, or of a bucket in it. Raises IndexError."""
        rows: range | np.ndarray = range(len(self.table))
        if bucket is not None:
            if bucket not in self._rows:
                known = self.table.bucket
                self._rows[bucket] = np.flatnonzero(known == bucket) if known is not None else np.empty(0, np.int64)
            rows = self._rows[bucket]
        if member >= len(rows):
            of = "" if bucket is None else f" of bucket {bucket}"
            raise IndexError(f"sample {member} is out of bounds for {len(rows)} samples{of}")
        return int(rows[member])


class ShardReader:
    """Reads samples by (shard, member), keeping the ``open_shards`` last used shards open.

    What the file system refuses is tried ``retries`` more times, the shard opened anew, after retry_wait_s, twice
    that, four times that, ... seconds. A shard that stays out of reach is *lost*: its samples fail at once, and one
    look a minute finds out whether it came back. Reads are positional, so processes forked from one another may
    share a reader. extensions: the members to read, where not all are wanted. obey_quarantine: whether samples on the
    data set's quarantine list fail, as ``QuarantinedError``.
    """

    def __init__(
        self,
        index: DatasetIndex,
        open_shards: int = 64,
        retries: int = 0,
        retry_wait_s: float = 0.5,
        *,
        extensions: Collection[str] | None = None,
        obey_quarantine: bool = False,
    ) -> None:
        self.index, self.open_shards, self.retries, self.retry_wait_s = index, open_shards, retries, retry_wait_s
        self.extensions = extensions
        self._quarantine = index.quarantine if obey_quarantine else {}
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._lost: dict[int, tuple[float, str]] = {}  # when to look again, and what was wrong

    def read(self, shard: int, member: int, patient: bool = True, bucket: int | None = None) -> dict[str, Any]:
        """The members of a sample by extension, and its key as ``__key__``.

        patient: whether to retry. bucket: ``member`` counts the samples of this bucket only. Raises SampleError if
        the shard cannot be read, or a checksum is wrong.
        """
        if self._quarantine.get(shard, ()) is None:
            raise QuarantinedError(self.index.names[shard], "", "the shard is in quarantine")
        if self.is_lost(shard):
            raise SampleError(self.index.names[shard], "", f"cannot be read: {self._lost[shard][1]}")
        retries = self.retries if patient and shard not in self._lost else 0
        for attempt in range(retries + 1):
            try:
                sample = self._read(shard, member, bucket)
            except (OSError, ShardError) as error:
                self._forget(shard)
                reason = str(error)
            else:
                self._lost.pop(shard, None)
                return sample
            if attempt < retries:
                time.sleep(self.retry_wait_s * 2**attempt)
        if patient:
            self._lost[shard] = time.monotonic() + LOOK_AGAIN_S, reason
        raise SampleError(self.index.names[shard], "", f"cannot be read: {reason}")

    def is_lost(self, shard: int) -> bool:
        """Whether all samples of the shard would fail for now."""
        return shard in self._lost and time.monotonic() < self._lost[shard][0]

    def _read(self, shard: int, member: int, bucket: int | None) -> dict[str, Any]:
        name, opened = self.index.names[shard], self._shard(shard)
        try:
            row = opened.row(member, bucket)
        except IndexError as error:
            raise SampleError(name, "", f"cannot be read: {error}") from None
        key = opened.table.key(row)
        if self._quarantine and key in (self._quarantine.get(shard) or ()):
            raise QuarantinedError(name, key, "is in quarantine")
        sample: dict[str, Any] = {"__key__": key}
        spans = opened.spans(row)
        for span, data in zip(spans, _read_spans(opened.file, spans), strict=True):
            if len(data) != span.size or zlib.crc32(data) != span.crc32:
                self._forget(shard)  # the next read opens what has this name then
                raise SampleError(name, key, f"checksum of {span.extension} at byte {span.offset} is wrong")
            sample[span.extension] = data
        return sample

    def close(self) -> None:
        for shard in list(self._open):
            self._forget(shard)

    def _shard(self, shard: int) -> _Open:
        if shard not in self._open:
            while len(self._open) >= self.open_shards:
                self._forget(next(iter(self._open)))
            table = self.index.shard(shard)
            if table.tar_bytes > self.index.bytes[shard]:
                raise ShardError(f"{self.index.names[shard]}: has the index of a larger shard")
            self._open[shard] = _Open(self.index.open(shard), table, self.extensions)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _forget(self, shard: int) -> None:
        if shard in self._open:
            self._open.pop(shard).file.close()


def _read_spans(file: BinaryIO, spans: list[_Span]) -> list[bytes]:
    """The bytes of each, in one read where they lie close together."""
    if not spans:
        return []
    low = min(span.offset for span in spans)
    high = max(span.offset + span.size for span in spans)
    if high - low > sum(span.size for span in spans) + _MAX_GAP * len(spans):
        return [os.pread(file.fileno(), span.size, span.offset) for span in spans]
    data = os.pread(file.fileno(), high - low, low)
    return [data[span.offset - low : span.offset - low + span.size] for span in spans]


def decode_image(data: bytes, size: int | tuple[int, int], crop: Literal["center", "resize"]) -> Tensor:
    """Decode to RGB of one size, a square's side or (H, W): uint8 (3, H, W).

    "center" cuts the largest middle part of that shape and resizes it, "resize" squeezes the whole image; both by
    Lanczos. The EXIF orientation is applied; transparent parts are white; of an animation the first frame is taken.
    Raises SampleError if the bytes are no image that can be read, or one of more than 2^27 pixels.
    """
    try:
        return _decode(data, (size, size) if isinstance(size, int) else size, crop)
    except SampleError:
        raise
    except Exception as error:  # on bad bytes decoders raise nearly anything
        raise SampleError("", "", f"image cannot be decoded: {type(error).__name__}: {error}") from None


def decode_moments(data: bytes, shape: tuple[int, ...]) -> Tensor:
    """Posterior moments from the bytes of an ``.npy`` file: float16, of ``shape``.

    Raises SampleError for anything else, and for values that are not finite.
    """
    moments = decode_array(data, shape, "moments")
    check_finite(moments, "moments")
    return torch.from_numpy(moments.copy())


def decode_array(data: bytes, shape: tuple[int, ...], what: str) -> np.ndarray:
    """A float16 array of ``shape`` from the bytes of an ``.npy`` file, not to be written to, its numbers not looked at.

    Raises SampleError for anything else; pickles are not loaded.
    """
    array = _from_npy(data, what)
    if array.dtype != np.float16 or array.shape != shape:
        raise SampleError("", "", f"{what} are {array.dtype} {array.shape}, expected float16 {shape}")
    return array


def decode_rows(data: bytes, what: str) -> np.ndarray:
    """A float16 array of any shape, its numbers not looked at. Raises SampleError for anything else."""
    array = _from_npy(data, what)
    if array.dtype != np.float16 or not array.ndim:
        raise SampleError("", "", f"{what} are {array.dtype} {array.shape}, expected float16")
    return array


def _from_npy(data: bytes, what: str) -> np.ndarray:
    try:
        length = 10 + int.from_bytes(data[8:10], "little")
        shape, fortran_order, dtype = _npy_header(data[:length])
        array = np.frombuffer(data, dtype, math.prod(shape), length)
        return array.reshape(shape, order="F" if fortran_order else "C")
    except Exception as error:  # on bad bytes numpy's header parser raises nearly anything
        raise SampleError("", "", f"{what} cannot be decoded: {type(error).__name__}: {error}") from None


def check_finite(array: np.ndarray, what: str) -> None:
    """Raise SampleError for float16 numbers that are not finite."""
    # All exponent bits set; many times faster than numpy's isfinite, which converts each number.
    if array.size and (array.view(np.uint16) & 0x7FFF).max() >= 0x7C00:
        raise SampleError("", "", f"{what} are not finite")


@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and dtype; the files of a data set begin alike. Raises ValueError."""
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not version 1.0 of the npy format")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError("holds Python objects" if dtype.hasobject else "has a negative size")
    return shape, fortran_order, dtype


def _decode(data: bytes, size: tuple[int, int], crop: Literal["center", "resize"]) -> Tensor:
    height, width = size
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise SampleError("", "", f"image of {image.width}x{image.height} pixels, more than {MAX_PIXELS}")
        turn = _TURNS.get(orientation(image))
        # Where only a part is decoded at 1/2, 1/4 or 1/8, twice the pixels are left for the resize.
        pixels = _decode_jpeg(data, image, 2 * max(size)) if image.format == "JPEG" else None
        if pixels is None:
            image.draft(None, (2 * max(size), 2 * max(size)))
            pixels = np.array(_to_rgb(image))
    if turn is not None:
        pixels = np.array(Image.fromarray(pixels).transpose(turn))
    if crop == "center":
        pixels = _middle(pixels, height, width)
    return _resize(pixels, height, width)


def _decode_jpeg(data: bytes, image: Image.Image, least: int) -> np.ndarray | None:
    """uint8 (h, w, 3), scaled down by 1, 2, 4 or 8 to no less than ``least``; None for what Pillow has to read."""
    if image.mode not in ("RGB", "L"):
        return None
    factor = next((f for f in (8, 4, 2) if min(image.size) // f >= least), 1)
    width, height = (-(-side // factor) for side in image.size)
    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:  # also of what libjpeg only warns of
        return None


def _middle(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The largest middle part with the proportion height to width."""
    h, w = pixels.shape[:2]
    cut_h, cut_w = min(h, max(1, round(w * height / width))), min(w, max(1, round(h * width / height)))
    top, left = (h - cut_h) // 2, (w - cut_w) // 2
    return pixels[top : top + cut_h, left : left + cut_w]


def _resize(pixels: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 (h, w, 3) -> uint8 (3, height, width), by Lanczos with antialiasing."""
    if _torch_has_lanczos():  # vectorised; within a level of Pillow's
        planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
        return interpolate(planes, size=(height, width), mode="lanczos", antialias=True)[0].contiguous()
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


@lru_cache(maxsize=1)
def _torch_has_lanczos() -> bool:
    try:
        interpolate(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), size=(2, 2), mode="lanczos", antialias=True)
    except (NotImplementedError, ValueError, RuntimeError):  # of older versions
        return False
    return True


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; from 5 on height and width change places."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF does not spoil the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip and not scale
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
