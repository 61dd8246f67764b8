"""Decodes the bytes of a sample's members: images and arrays.

Every picture of the project is decoded here, of training, of data preparation and of evaluations: EXIF orientation
applied, transparent parts white, 16 bits of grey scaled to 8, the first picture of a file that holds several.
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

if TYPE_CHECKING:  # it is imported where it is used: --help of a script must not wait for it
    from torch import Tensor

MAX_PIXELS = 1 << 27

# Of the content, whatever the name says; only those that the installed Pillow reads. MPO is JPEG with more pictures.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
# Of members and files that may be in one of them.
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "jpe", "jfif", "mpo", "gif", "bmp", "tif", "tiff"),
    *("avif", "jp2", "j2k", "jpx"),
)

_ORIENTATION = 0x0112
_PNG = b"\x89PNG\r\n\x1a\n"
_TEXT_CHUNK = 1 << 16  # bytes of a PNG's text that is passed on to Pillow, which refuses a picture for a long one

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
    """What is known of an image before its pixels are decoded. width, height: as it is shown; format: Pillow's name."""

    width: int
    height: int
    format: str


def read_header(data: bytes) -> Header:
    """Size and format of an image. Raises SampleError if the bytes are no image, or one of more than 2^27 pixels."""
    with _readable(), _open(data) as image:
        width, height = image.size
        if orientation(image) >= 5:
            width, height = height, width
        return Header(width, height, _format(image))


def decode_whole(data: bytes) -> np.ndarray:
    """All of an image as it is shown: uint8 (h, w, 3). Raises SampleError as ``decode_image`` does."""
    with _readable(), _open(data) as image:
        pixels = _decode_jpeg(data, image, min(image.size)) if _format(image) == "JPEG" else None
        return _turned(np.array(_to_rgb(image)) if pixels is None else pixels, orientation(image))


def decode_image(data: bytes, size: int | tuple[int, int], crop: Literal["center", "resize"]) -> Tensor:
    """Decode to RGB of one size, a square's side or (H, W): uint8 (3, H, W).

    "center" cuts the largest middle part of that shape and resizes it, "resize" squeezes the whole image; both by
    Lanczos. The EXIF orientation is applied; transparent parts are white; of an animation the first frame is taken.
    Raises SampleError if the bytes are no image that can be read, or one of more than 2^27 pixels.
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


@contextmanager
def _readable() -> Iterator[None]:
    """Whatever goes wrong in here becomes a SampleError."""
    try:
        yield
    except SampleError:
        raise
    except Image.DecompressionBombError:  # Pillow has a limit of its own, above ours
        raise SampleError("", "", f"image of more than {MAX_PIXELS} pixels (DecompressionBombError)") from None
    except Image.UnidentifiedImageError:
        formats = ", ".join(_formats())
        raise SampleError("", "", f"image cannot be decoded: it is in none of the formats {formats}") from None
    except Exception as error:  # on bad bytes decoders raise nearly anything
        raise SampleError("", "", f"image cannot be decoded: {type(error).__name__}: {error}") from None


def _open(data: bytes) -> Image.Image:
    """An image whose pixels are not decoded yet. Raises SampleError if there are too many."""
    if data.startswith(_PNG):
        data = _without_long_text(data)
    image = Image.open(io.BytesIO(data), formats=_formats())
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise SampleError("", "", f"image of {image.width}x{image.height} pixels, more than {MAX_PIXELS}")
    return image


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """The formats that are read, as far as the installed Pillow has them."""
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def _format(image: Image.Image) -> str:
    """The format; a JPEG of several pictures, as phones make them, counts as one."""
    return "JPEG" if image.format == "MPO" else str(image.format)


def _without_long_text(data: bytes) -> bytes:
    """A PNG without compressed and long text, which say nothing of the pixels; all else is left to the decoder."""
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
    """Whether an iTXt chunk is compressed: the byte behind its keyword and a zero says so."""
    keyword_end = data.find(b"\0", chunk + 8)
    return data[chunk + 4 : chunk + 8] == b"iTXt" and data[keyword_end + 1 : keyword_end + 2] == b"\1"


def _decode(data: bytes, size: tuple[int, int], crop: Literal["center", "resize"]) -> Tensor:
    height, width = size
    with _open(data) as image:
        # Where only a part is decoded at 1/2, 1/4 or 1/8, twice the pixels are left for the resize.
        pixels = _decode_jpeg(data, image, 2 * max(size)) if _format(image) == "JPEG" else None
        if pixels is None:
            image.draft(None, (2 * max(size), 2 * max(size)))
            pixels = np.array(_to_rgb(image))
        pixels = _turned(pixels, orientation(image))
    if crop == "center":
        pixels = _middle(pixels, height, width)
    return _resize(pixels, height, width)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (h, w, 3) as the EXIF orientation wants them shown."""
    turn = _TURNS.get(orientation)
    return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))


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
    import torch
    from torch.nn.functional import interpolate

    if _torch_has_lanczos():  # vectorised; within a level of Pillow's
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
    except (NotImplementedError, ValueError, RuntimeError):  # of older versions
        return False
    return True


def read_orientation(data: bytes) -> int:
    """``orientation`` of an image that is not decoded; 1 for bytes that are none."""
    try:
        with _open(data) as image:
            return orientation(image)
    except Exception:  # whoever decodes it will tell
        return 1


def orientation(image: Image.Image) -> int:
    """How an image has still to be turned, as EXIF numbers it, 1 to 8; from 5 on height and width change places."""
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF does not spoil the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip and not scale
        return _from_16_bits(image)
    if image.mode == "F":
        raise SampleError("", "", "image of floating-point numbers: which of them is white is not known")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled to 8; the value that a PNG declares transparent is white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise SampleError("", "", "image of 32-bit numbers: which of them is white is not known")
    grey = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
