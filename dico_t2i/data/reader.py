"""Samples by position: checked bytes out of the shards, images and latents out of the bytes."""

from __future__ import annotations

import io
import os
import time
import zlib
from collections import OrderedDict
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dico_t2i.data.index import DataError, DatasetIndex, ShardError, ShardIndex

MAX_PIXELS = 1 << 27
LOOK_AGAIN_S = 60.0  # before a shard that was lost is tried again
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # of the content, whatever the member's name says

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


class ShardReader:
    """Reads samples by (shard, member), keeping the ``open_shards`` last used shards open.

    What the file system refuses is tried ``retries`` more times, the shard opened anew, after retry_wait_s, twice
    that, four times that, ... seconds. A shard that stays out of reach is *lost*: its samples fail at once, and one
    look a minute finds out whether it came back. Reads are positional, so processes forked from one another may
    share a reader.
    """

    def __init__(self, index: DatasetIndex, open_shards: int = 64, retries: int = 0, retry_wait_s: float = 0.5) -> None:
        self.index, self.open_shards, self.retries, self.retry_wait_s = index, open_shards, retries, retry_wait_s
        self._open: OrderedDict[int, tuple[BinaryIO, ShardIndex]] = OrderedDict()
        self._lost: dict[int, tuple[float, str]] = {}  # when to look again, and what was wrong

    def read(self, shard: int, member: int, patient: bool = True) -> dict[str, Any]:
        """The members of a sample by extension, and its key as ``__key__``.

        patient: whether to retry. Raises SampleError if the shard cannot be read or a checksum is wrong.
        """
        if self.is_lost(shard):
            raise SampleError(self.index.names[shard], "", f"cannot be read: {self._lost[shard][1]}")
        retries = self.retries if patient and shard not in self._lost else 0
        for attempt in range(retries + 1):
            try:
                sample = self._read(shard, member)
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

    def _read(self, shard: int, member: int) -> dict[str, Any]:
        name = self.index.names[shard]
        file, table = self._shard(shard)
        if member >= len(table):
            raise SampleError(name, "", f"cannot be read: sample {member} is out of bounds for {len(table)} samples")
        key = table.key(member)
        sample: dict[str, Any] = {"__key__": key}
        for column, extension in enumerate(table.extensions):
            offset, size = int(table.offsets[member, column]), int(table.sizes[member, column])
            if offset < 0:
                continue
            data = os.pread(file.fileno(), size, offset)
            if len(data) != size or zlib.crc32(data) != table.crc32[member, column]:
                self._forget(shard)  # the next read opens what has this name then
                raise SampleError(name, key, f"checksum of {extension} at byte {offset} is wrong")
            sample[extension] = data
        return sample

    def close(self) -> None:
        for shard in list(self._open):
            self._forget(shard)

    def _shard(self, shard: int) -> tuple[BinaryIO, ShardIndex]:
        if shard not in self._open:
            while len(self._open) >= self.open_shards:
                self._forget(next(iter(self._open)))
            table = self.index.shard(shard)
            self._open[shard] = self.index.path(shard).open("rb", buffering=0), table
        self._open.move_to_end(shard)
        return self._open[shard]

    def _forget(self, shard: int) -> None:
        if shard in self._open:
            self._open.pop(shard)[0].close()


def decode_image(data: bytes, size: int, crop: Literal["center", "resize"]) -> Tensor:
    """Decode to a square of RGB: uint8 (3, size, size).

    "center" cuts the middle square and resizes it, "resize" squeezes the whole image; both by Lanczos. The
    EXIF orientation is applied; transparent parts are white; of an animation the first frame is taken. Raises
    SampleError if the bytes are no image that can be read, or one of more than 2^27 pixels.
    """
    try:
        return _decode(data, size, crop)
    except SampleError:
        raise
    except Exception as error:  # on bad bytes decoders raise nearly anything
        raise SampleError("", "", f"image cannot be decoded: {type(error).__name__}: {error}") from None


def decode_moments(data: bytes, shape: tuple[int, ...]) -> Tensor:
    """Posterior moments from the bytes of an ``.npy`` file: float16, of ``shape``.

    Raises SampleError for anything else, and for values that are not finite.
    """
    try:
        moments = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # on bad bytes numpy's header parser raises nearly anything
        raise SampleError("", "", f"moments cannot be decoded: {type(error).__name__}: {error}") from None
    if not isinstance(moments, np.ndarray) or moments.dtype != np.float16 or moments.shape != shape:
        found = f"{getattr(moments, 'dtype', type(moments))} {getattr(moments, 'shape', '')}"
        raise SampleError("", "", f"moments are {found}, expected float16 {shape}")
    if not np.isfinite(moments).all():
        raise SampleError("", "", "moments are not finite")
    return torch.from_numpy(moments)


def _decode(data: bytes, size: int, crop: Literal["center", "resize"]) -> Tensor:
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise SampleError("", "", f"image of {image.width}x{image.height} pixels, more than {MAX_PIXELS}")
        image.draft(None, (2 * size, 2 * size))  # JPEG only: decodes at 1/2, 1/4 or 1/8 where that is enough
        turn = _TURNS.get(_orientation(image))
        rgb = _to_rgb(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
    if crop == "center":
        side = min(rgb.size)
        left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
        rgb = rgb.crop((left, top, left + side, top + side))
    square = rgb.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _orientation(image: Image.Image) -> int:
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
