"""Decodes the bytes of a sample's members: images and arrays."""

from __future__ import annotations

import io
import math
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from dico_t2i.data.errors import SampleError

MAX_PIXELS = 1 << 27


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
