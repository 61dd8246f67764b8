"""Decodes the bytes of a sample's members: images and arrays.

Training, data preparation and evaluations all decode their images here. The EXIF orientation is applied, transparent
parts become white, 16-bit greyscale is scaled to 8 bits, and a file with several images gives the first one.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from dico_t2i.data.errors import SampleError

if TYPE_CHECKING:  # imported where it is used, so that --help of a script does not wait for it
    from torch import Tensor

MAX_PIXELS = 1 << 27

# Formats of the content, whatever the file's name; a Pillow that cannot read one ignores it. MPO is a multi-image JPEG.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
# Extensions of members and files that are read as images.
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "jpe", "jfif", "mpo", "gif", "bmp", "tif", "tiff"),
    *("avif", "jp2", "j2k", "jpx"),
)

_ORIENTATION = 0x0112
_WHITE = (255, 255, 255)
_PNG = b"\x89PNG\r\n\x1a\n"
_TEXT_CHUNK = 1 << 16  # bytes; longer texts of a PNG are removed, since Pillow refuses images that have them

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Header(NamedTuple):
    """An image's width and height as displayed, and Pillow's name of its format; known before it is decoded."""

    width: int
    height: int
    format: str


def read_header(data: bytes) -> Header:
    """The size and format of an image. Raises SampleError if it cannot be read, or has more than 2^27 pixels."""
    with _readable(), _open(data) as image:
        width, height = image.size
        if orientation(image) >= 5:
            width, height = height, width
        return Header(width, height, _format(image))


def is_transparent(data: bytes) -> bool:
    """Whether an image has transparent parts, by its header. Raises SampleError if it cannot be read."""
    with _readable(), _open(data) as image:
        return image.has_transparency_data


def decode_whole(data: bytes, background: tuple[int, int, int] = _WHITE) -> np.ndarray:
    """The whole image as displayed: uint8 (h, w, 3). Raises SampleError as ``decode_image`` does.

    background: the colour behind transparent parts.
    """
    with _readable(), _open(data) as image:
        pixels = _decode_jpeg(data, image, min(image.size)) if _format(image) == "JPEG" else None
        return _turned(np.array(_to_rgb(image, background)) if pixels is None else pixels, orientation(image))


def decode_image(data: bytes, size: int | tuple[int, int], crop: Literal["center", "resize"]) -> Tensor:
    """Decode an image to RGB of a given size: uint8 (3, H, W). size: the side of a square, or (H, W).

    "center" crops the largest centred part of that aspect ratio and resizes it; "resize" resizes the whole image. Both
    use Lanczos. The EXIF orientation is applied, transparent parts become white, and an animation gives its first
    frame. Raises SampleError if the image cannot be read, or has more than 2^27 pixels.
    """
    with _readable():
        return _decode(data, (size, size) if isinstance(size, int) else size, crop)


def decode_moments(data: bytes, shape: tuple[int, ...]) -> Tensor:
    """Posterior moments from the bytes of an ``.npy`` file: float16, of ``shape``.

    Raises SampleError for anything else, and for values that are not finite.
    """
    moments = decode_array(data, shape, "moments")
    check_finite(moments, "moments")
    import torch

    return torch.from_numpy(moments.copy())


def decode_array(data: bytes, shape: tuple[int, ...], what: str) -> np.ndarray:
    """A read-only float16 array of ``shape`` from the bytes of an ``.npy`` file; its values are not checked.

    Raises SampleError for anything else; pickles are not loaded.
    """
    array = _from_npy(data, what)
    if array.dtype != np.float16 or array.shape != shape:
        raise SampleError("", "", f"{what} are {array.dtype} {array.shape}, expected float16 {shape}")
    return array


def decode_rows(data: bytes, what: str) -> np.ndarray:
    """A read-only float16 array of any shape; its values are not checked. Raises SampleError for anything else."""
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
    # Looks for numbers whose exponent bits are all set: many times faster than numpy's isfinite, which converts each.
    if array.size and (array.view(np.uint16) & 0x7FFF).max() >= 0x7C00:
        raise SampleError("", "", f"{what} are not finite")


@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order or not, and dtype; cached, as a data set's files have equal headers. Raises ValueError."""
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not version 1.0 of the npy format")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError("holds Python objects" if dtype.hasobject else "has a negative size")
    return shape, fortran_order, dtype


@contextmanager
def _readable() -> Iterator[None]:
    """Turn every error inside the context into a SampleError."""
    try:
        yield
    except SampleError:
        raise
    except Image.DecompressionBombError:  # Pillow has its own limit, which is higher than ours
        raise SampleError("", "", f"image of more than {MAX_PIXELS} pixels (DecompressionBombError)") from None
    except Image.UnidentifiedImageError:
        formats = ", ".join(_formats())
        raise SampleError("", "", f"image cannot be decoded: it is in none of the formats {formats}") from None
    except Exception as error:  # on bad bytes decoders raise nearly anything
        raise SampleError("", "", f"image cannot be decoded: {type(error).__name__}: {error}") from None


def _open(data: bytes) -> Image.Image:
    """Open an image without decoding its pixels. Raises SampleError if there are too many."""
    if data.startswith(_PNG):
        data = _without_long_text(data)
    image = Image.open(io.BytesIO(data), formats=_formats())
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise SampleError("", "", f"image of {image.width}x{image.height} pixels, more than {MAX_PIXELS}")
    return image


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those of ``IMAGE_FORMATS`` that the installed Pillow can read."""
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def _format(image: Image.Image) -> str:
    """The format; MPO, a JPEG with several images as some phones make it, counts as JPEG."""
    return "JPEG" if image.format == "MPO" else str(image.format)


def _without_long_text(data: bytes) -> bytes:
    """A PNG without its compressed and its long texts, which do not affect the pixels; nothing else is changed."""
    kept, start, end = [], 0, len(_PNG)
    kind = b""
    while kind != b"IEND" and end + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, end)
        following = end + 12 + length
        if kind == b"zTXt" or (kind in (b"tEXt", b"iTXt") and (length > _TEXT_CHUNK or _is_compressed(data, end))):
            kept.append(data[start:end])
            start = following
        end = following
    return b"".join([*kept, data[start:]]) if kept else data


def _is_compressed(data: bytes, chunk: int) -> bool:
    """Whether a chunk is a compressed iTXt, by the byte that follows its keyword and a zero."""
    keyword_end = data.find(b"\0", chunk + 8)
    return data[chunk + 4 : chunk + 8] == b"iTXt" and data[keyword_end + 1 : keyword_end + 2] == b"\1"


def _decode(data: bytes, size: tuple[int, int], crop: Literal["center", "resize"]) -> Tensor:
    height, width = size
    with _open(data) as image:
        # The decoder may reduce by 2, 4 or 8, but keeps at least twice the target size for the resize.
        pixels = _decode_jpeg(data, image, 2 * max(size)) if _format(image) == "JPEG" else None
        if pixels is None:
            image.draft(None, (2 * max(size), 2 * max(size)))
            pixels = np.array(_to_rgb(image))
        pixels = _turned(pixels, orientation(image))
    if crop == "center":
        pixels = _middle(pixels, height, width)
    return _resize(pixels, height, width)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels (h, w, 3) as the EXIF orientation requires."""
    turn = _TURNS.get(orientation)
    return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))


def _decode_jpeg(data: bytes, image: Image.Image, least: int) -> np.ndarray | None:
    """Decode to uint8 (h, w, 3), reduced by 1, 2, 4 or 8 to at least ``least``; None if only Pillow can decode it."""
    if image.mode not in ("RGB", "L"):
        return None
    factor = next((f for f in (8, 4, 2) if min(image.size) // f >= least), 1)
    width, height = (-(-side // factor) for side in image.size)
    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:  # also raised where libjpeg only warns
        return None


def _middle(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The largest centred part with the aspect ratio of height and width."""
    h, w = pixels.shape[:2]
    cut_h, cut_w = min(h, max(1, round(w * height / width))), min(w, max(1, round(h * width / height)))
    top, left = (h - cut_h) // 2, (w - cut_w) // 2
    return pixels[top : top + cut_h, left : left + cut_w]


def _resize(pixels: np.ndarray, height: int, width: int) -> Tensor:
    """Resize uint8 (h, w, 3) to uint8 (3, height, width), by Lanczos with antialiasing."""
    import torch
    from torch.nn.functional import interpolate

    if _torch_has_lanczos():  # vectorised; differs from Pillow's result by at most one level
        planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
        return interpolate(planes, size=(height, width), mode="lanczos", antialias=True)[0].contiguous()
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


@lru_cache(maxsize=1)
def _torch_has_lanczos() -> bool:
    import torch
    from torch.nn.functional import interpolate

    try:
        interpolate(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), size=(2, 2), mode="lanczos", antialias=True)
    except (NotImplementedError, ValueError, RuntimeError):  # raised by older versions
        return False
    return True


def read_orientation(data: bytes) -> int:
    """The ``orientation`` of an image that is not decoded; 1 for bytes that are not an image."""
    try:
        with _open(data) as image:
            return orientation(image)
    except Exception:  # decoding it reports the error
        return 1


def orientation(image: Image.Image) -> int:
    """EXIF's number, 1 to 8, of the turn that an image still needs; from 5 on, height and width are swapped."""
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the pixels are usable without valid EXIF data
        return 1


def _to_rgb(image: Image.Image, background: tuple[int, int, int] = _WHITE) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow would clip instead of scale
        return _from_16_bits(image)
    if image.mode == "F":
        raise SampleError("", "", "image of floating-point numbers: the value of white is not known")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit greyscale to 8 bits; the value that a PNG declares transparent becomes white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise SampleError("", "", "image of 32-bit numbers: the value of white is not known")
    grey = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
