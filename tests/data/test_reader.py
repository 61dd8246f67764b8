import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dico_t2i.data.decode import decode_image, decode_moments
from dico_t2i.data.errors import SampleError
from dico_t2i.data.index import load_index
from dico_t2i.data.reader import ShardReader
from dico_t2i.data.writer import ShardWriter

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def solid(decoded, colour, tolerance=3):
    """Whether all pixels of (3, H, W) have about this colour."""
    return (decoded.int() - torch.tensor(colour)[:, None, None]).abs().max() <= tolerance


def halves(left, right, size=64, mode="RGB"):
    image = Image.new(mode, (size, size), left)
    image.paste(right, (size // 2, 0, size, size))
    return image


@pytest.fixture
def index(tmp_path):
    with ShardWriter(tmp_path, samples_per_shard=3) as writer:
        for i in range(9):
            writer.write({"__key__": f"k{i}", "jpg": bytes([i]) * 1000, "json": {"n": i}})
    return load_index(tmp_path)


def test_samples_are_read_by_position(index):
    reader = ShardReader(index, open_shards=2)
    for number in np.random.default_rng(0).permutation(np.repeat(np.arange(9), 3)).tolist():
        sample = reader.read(number // 3, number % 3)
        assert sample == {
            "__key__": f"k{number}",
            "jpg": bytes([number]) * 1000,
            "json": b'{"n": %d}' % number,
        }
        assert len(reader._open) <= 2
    reader.close()
    assert not reader._open


def test_a_flipped_byte_is_found_and_named(index):
    content = bytearray(index.path(1).read_bytes())
    content[int(index.shard(1).offsets[2, 0]) + 500] ^= 1
    index.path(1).write_bytes(content)
    reader = ShardReader(index)
    assert reader.read(1, 1)["__key__"] == "k4"
    with pytest.raises(SampleError, match=r"shard-000001.*'k5'.*checksum of jpg") as caught:
        reader.read(1, 2)
    assert (caught.value.shard, caught.value.key) == ("shard-000001.tar", "k5")


def test_a_shard_cut_absent_or_without_index_is_a_sample_error(index):
    end = int(index.shard(0).offsets[2].max())
    index.path(0).write_bytes(index.path(0).read_bytes()[:end])
    index.path(1).unlink()
    index.path(2).with_name("shard-000002.tar.index").write_bytes(b"broken")
    reader = ShardReader(index)
    assert reader.read(0, 0)["__key__"] == "k0"
    for shard, member in ((0, 2), (1, 0), (2, 0)):
        with pytest.raises(SampleError, match=index.names[shard]):
            reader.read(shard, member)
    with pytest.raises(SampleError, match="out of bounds"):
        reader.read(0, 7)


def test_center_crop_takes_the_middle_square():
    image = Image.new("RGB", (96, 32), RED)
    image.paste(GREEN, (32, 0, 64, 32))
    assert solid(decode_image(encoded(image), 16, "center"), GREEN, 0)
    assert solid(decode_image(encoded(image.transpose(Image.Transpose.ROTATE_90)), 16, "center"), GREEN, 0)
    squeezed = decode_image(encoded(image), 48, "resize")
    assert solid(squeezed[:, :, :12], RED)
    assert solid(squeezed[:, :, -12:], RED)
    assert solid(squeezed[:, :, 20:28], GREEN)


def test_an_image_of_the_right_size_is_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    decoded = decode_image(encoded(Image.fromarray(pixels)), 32, "center")
    assert (decoded.shape, decoded.dtype) == ((3, 32, 32), torch.uint8)
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("crop", ["center", "resize"])
def test_exif_orientation_is_applied(orientation, crop):
    from PIL import ImageOps

    rng = np.random.default_rng(orientation)
    image = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize((60, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    decoded = decode_image(data, 20, crop)
    expected = decode_image(encoded(upright), 20, crop)
    assert torch.equal(decoded, expected)
    if orientation > 1:
        assert (decoded.int() - decode_image(encoded(image), 20, crop).int()).abs().max() > 20


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_spoil_an_image():
    data = encoded(Image.new("RGB", (16, 16), RED), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert solid(decode_image(data, 16, "center"), RED)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_transparent_parts_are_white(form):
    image = halves((255, 0, 0, 255), (0, 0, 255, 0), mode="RGBA")
    decoded = decode_image(encoded(image, form, lossless=True), 64, "center")
    assert solid(decoded[:, :, :30], RED)
    assert solid(decoded[:, :, 34:], WHITE)
    half = decode_image(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), form), 8, "center")
    assert solid(half, (127, 127, 127))


def test_transparency_of_palettes_and_grey_is_white():
    palette = halves(RED, BLUE).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    transparent = palette.getpixel((60, 0))
    decoded = decode_image(encoded(palette, transparency=transparent), 64, "center")
    assert solid(decoded[:, :, :30], RED)
    assert solid(decoded[:, :, 34:], WHITE)
    grey = decode_image(encoded(halves((100, 255), (0, 0), mode="LA")), 64, "center")
    assert solid(grey[:, :, :30], (100, 100, 100))
    assert solid(grey[:, :, 34:], WHITE)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(256, 0)
    data = encoded(Image.fromarray(ramp))
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    decoded = decode_image(data, 256, "center")
    assert (decoded[0, 0].int() - torch.arange(256)).abs().max() <= 1
    assert torch.equal(decoded[0], decoded[2])


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode):
    image = Image.new("RGB", (64, 64), WHITE)
    form = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    assert solid(decode_image(encoded(image.convert(mode), form), 32, "center"), WHITE)
    if mode != "L" and mode != "1":
        red = Image.new("RGB", (64, 64), RED).convert(mode)
        assert solid(decode_image(encoded(red, form), 32, "center"), RED)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(form):
    frames = [Image.new("RGB", (16, 16), colour) for colour in (GREEN, RED, BLUE)]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=100)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert solid(decode_image(data, 16, "center"), GREEN, 6)


def test_large_jpegs_decode_like_large_pngs():
    y, x = np.mgrid[0:1200, 0:1600] / 5
    waves = (127 + 60 * np.sin(x) + 60 * np.cos(y)).astype(np.uint8)
    image = Image.fromarray(np.stack([waves, waves[::-1], 255 - waves], -1))
    jpeg = decode_image(encoded(image, "JPEG", quality=98, subsampling=0), 256, "center")
    png = decode_image(encoded(image), 256, "center")
    assert png.double().std() > 30
    assert (jpeg.int() - png.int()).abs().max() <= 6


def test_too_many_pixels_are_refused_before_decoding():
    def png_header(width, height):
        start = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + start + struct.pack(">I", zlib.crc32(start))
        return head + struct.pack(">I", 9) + b"IDAT"

    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(SampleError, match="30000x5000"):
        decode_image(png_header(30_000, 5_000), 16, "center")
    with pytest.raises(SampleError, match="DecompressionBomb"):
        decode_image(png_header(2**30, 2**30), 16, "center")


def test_what_is_no_image_is_refused():
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    for data in (b"", b"text", whole[:20], whole[:-2000], eps):
        with pytest.raises(SampleError, match="image cannot be decoded"):
            decode_image(data, 16, "center")


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**31), form=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]))
def test_damaged_images_never_raise_anything_else(seed, form):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)
    data = np.frombuffer(encoded(Image.fromarray(pixels), form), np.uint8).copy()
    data[rng.integers(0, len(data), 5)] = rng.integers(0, 256, 5)
    with contextlib.suppress(SampleError):
        assert decode_image(data.tobytes(), 16, "center").shape == (3, 16, 16)


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def test_moments_are_checked():
    moments = np.random.default_rng(0).normal(size=(8, 4, 4)).astype(np.float16)
    assert np.array_equal(decode_moments(npy(moments), (8, 4, 4)).numpy(), moments)
    for wrong in (moments.astype(np.float32), moments[:, :2], moments[None]):
        with pytest.raises(SampleError, match=r"expected float16 \(8, 4, 4\)"):
            decode_moments(npy(wrong), (8, 4, 4))
    for value in (np.nan, np.inf):
        moments[3, 2, 1] = value
        with pytest.raises(SampleError, match="not finite"):
            decode_moments(npy(moments), (8, 4, 4))
    pickled = npy(np.array([{}, {}], dtype=object), allow_pickle=True)
    for data in (b"", b"garbage", npy(moments)[:-5], pickled):
        with pytest.raises(SampleError, match="moments cannot be decoded"):
            decode_moments(data, (8, 4, 4))
