"""Folders of pictures as evaluations see them: used or counted, and as training sees them."""

import numpy as np
import pytest
from PIL import Image

from dico_t2i.data.decode import decode_whole
from evals.quality.images import NpzImages, open_images


@pytest.fixture
def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (24, 16, 3), dtype=np.uint8))


def pixels(folder):
    images = open_images(folder, "none")
    return images.read(range(len(images)))


@pytest.mark.parametrize("extension", ["tif", "tiff", "gif", "bmp", "png", "webp", "jfif", "TIF"])
def test_every_format_that_is_read_is_used(tmp_path, picture, extension):
    kind = {"tif": "TIFF", "jfif": "JPEG"}.get(extension.lower())
    picture.save(tmp_path / f"a.{extension}", kind, **({"lossless": True} if extension == "webp" else {}))
    (found,) = pixels(tmp_path)
    exact = extension not in ("gif", "jfif")  # which have few colours, or are lossy
    assert found.shape == (24, 16, 3)
    assert not exact or np.array_equal(found, np.asarray(picture))


def test_files_seen_are_used_or_counted(tmp_path, picture):
    (tmp_path / "deep").mkdir()
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "deep" / "b.tiff")
    for name in ("c.heic", "d.JXL", "deep/e.heic", "notes.txt", "README", "grid.png", "sample.json"):
        (tmp_path / name).write_bytes(b"x")
    images = open_images(tmp_path, "none")
    assert len(images) == 2
    assert images.left_out == {".heic": 2, ".jxl": 1, ".txt": 1, "README": 1, "grid.png": 1, "sample.json": 1}
    assert images.unread == 3
    assert len(images) + sum(images.left_out.values()) == sum(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("value", [0, 1000, 30000, 65535])
def test_16_bits_of_grey_are_scaled(tmp_path, value):
    Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / "a.png")
    assert np.unique(pixels(tmp_path)[0]).tolist() == [value >> 8]


@pytest.mark.parametrize(("mode", "info"), [("RGBA", {}), ("LA", {}), ("P", {"transparency": 0})])
def test_transparent_parts_are_white_as_in_training(tmp_path, mode, info):
    image = Image.new(mode, (8, 8), {"RGBA": (10, 20, 30, 0), "LA": (10, 0), "P": 0}[mode])
    image.save(tmp_path / "a.png", **info)
    (found,) = pixels(tmp_path)
    assert (found == 255).all()
    assert np.array_equal(found, decode_whole((tmp_path / "a.png").read_bytes()))


@pytest.mark.parametrize("turn", [3, 6, 8])
def test_orientation_is_applied_and_counted(tmp_path, picture, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    picture.save(tmp_path / "a.png", exif=exif)
    picture.save(tmp_path / "b.png")
    turned, plain = pixels(tmp_path)
    assert turned.shape[:2] == ((16, 24) if turn > 4 else (24, 16))
    assert not np.array_equal(turned, plain)
    assert open_images(tmp_path, "none").identity()["turned_by_exif"] == "1"


def test_what_is_plain_is_as_pillow_has_it(tmp_path, picture):
    picture.save(tmp_path / "a.jpg", quality=90)
    (found,) = pixels(tmp_path)
    with Image.open(tmp_path / "a.jpg") as image:
        assert np.array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("arrays", [{"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, {"mu": np.zeros(3)}])
def test_an_npz_without_images(tmp_path, arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=r"a\.npz: .*images"):
        NpzImages(tmp_path / "a.npz")


def test_a_folder_without_images_tells_what_it_has(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"there are no images in it .*1 \.heic"):
        open_images(tmp_path, "none")
