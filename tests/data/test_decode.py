"""The one picture decoder: every format, orientation, transparency and depth as Pillow shows them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, features
from PIL.PngImagePlugin import PngInfo

from dico_t2i.data.decode import decode_image, decode_whole, read_header
from dico_t2i.data.errors import SampleError

ORIENTATION = 0x0112
SIZE = (24, 16)


def picture(mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (2, 3, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize(SIZE, Image.Resampling.BICUBIC).convert(mode)


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def shown(data):
    """As Pillow shows it, transparent parts on white."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))


FORMS = {"JPEG": {}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "AVIF": {}, "MPO": {"save_all": True}}
OTHERS = ["GIF", "BMP", "JPEG2000"]


@pytest.mark.parametrize("form", [*FORMS, *OTHERS])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_every_format_is_shown_as_pillow_shows_it(form, orientation):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    options = dict(FORMS.get(form, {}))
    if form == "MPO":
        options["append_images"] = [picture(seed=1)]
    if form in FORMS:
        options["exif"] = turned(orientation)
    data = encoded(picture(), form, **options)
    expected = shown(data)
    found, header = decode_whole(data), read_header(data)
    assert found.shape == expected.shape
    assert abs(found.astype(int) - expected).max() <= 3  # of two JPEG decoders
    assert (header.height, header.width) == expected.shape[:2]
    assert header.format == ("JPEG" if form == "MPO" else form)
    height, width = expected.shape[:2]
    assert torch_like(decode_image(data, (height, width), "resize")).tolist() == found.tolist()


def torch_like(tensor):
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_is_shown_as_pillow_shows_it(mode):
    form = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    image = picture("RGBA" if mode in ("LA", "RGBA") else "RGB")
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(SIZE))
    data = encoded(image.convert(mode), form)
    assert abs(decode_whole(data).astype(int) - shown(data)).max() <= 3


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(form):
    values = (np.arange(SIZE[0] * SIZE[1]).reshape(SIZE[1], SIZE[0]) * 170).astype(np.uint16)
    found = decode_whole(encoded(Image.fromarray(values), form))
    assert (found == (values >> 8)[..., None]).all()


def test_numbers_without_a_white_are_refused():
    for values in (np.linspace(0, 1, 64, dtype=np.float32), np.linspace(0, 1e6, 64).astype(np.int32)):
        with pytest.raises(SampleError, match="the value of white is not known"):
            decode_whole(encoded(Image.fromarray(values.reshape(8, 8)), "TIFF"))


def png_with(kind, content):
    data = encoded(picture(), "PNG")
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data[:33] + chunk + data[33:]


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (b"tEXt", b"parameters\0" + b"x" * (2 << 20)),
        (b"zTXt", b"parameters\0\0" + zlib.compress(b"x" * (2 << 20))),
        (b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"x" * (2 << 20))),
        (b"iTXt", b"workflow\0\0\0\0\0" + b"x" * (2 << 20)),
    ],
)
def test_a_png_with_a_large_text_chunk_is_read(kind, content):
    assert (decode_whole(png_with(kind, content)) == np.asarray(picture())).all()


def test_an_orientation_in_xmp_survives_the_removal_of_long_text():
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    info.add_text("parameters", "x" * 100_000)
    data = encoded(picture(), "PNG", pnginfo=info)
    assert decode_whole(data).shape == (24, 16, 3)
    assert read_header(data)[:2] == (16, 24)


def test_the_first_picture_of_several_is_taken():
    others = [picture(seed=seed) for seed in (1, 2)]
    for form, options in (("TIFF", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(picture(), form, save_all=True, append_images=others, **options)
        assert (decode_whole(data) == np.asarray(picture())).all(), form


def test_what_is_no_picture_says_which_formats_are_read():
    with pytest.raises(SampleError, match="none of the formats JPEG, PNG, WEBP"):
        read_header(b"hello")
