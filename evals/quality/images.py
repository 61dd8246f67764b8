"""Sets of images to compare: files, or an npz file in the layout of ADM's evaluation.

Files are decoded as in training (dico_t2i/data/decode.py): turned as EXIF says, with transparent parts white and 16-bit
grey scaled to 8 bits. The original evaluations read files with Pillow's convert("RGB"), which does not turn images,
drops transparency and makes 16-bit grey white; for files without these features the pixels are the same.
"""

import hashlib
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pil

from dico_t2i.data.decode import IMAGE_EXTENSIONS, decode_image, decode_whole, read_orientation
from dico_t2i.data.errors import SampleError
from dico_t2i.files import temporary

Image = NDArray[np.uint8]
Crop = Literal["center", "adm", "none"]

_EXTENSIONS = {f".{extension}" for extension in IMAGE_EXTENSIONS}
_UNREAD = {".heic", ".heif", ".jxl", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw", ".exr", ".hdr", ".tga", ".ppm"}


_OF_SAMPLES = {"grid.png", "sample.json"}  # files that `dico sample` writes beside the images


class ImageSet(Protocol):
    """Images in a fixed order."""

    def __len__(self) -> int: ...
    def read(self, index: range) -> list[Image]: ...
    def identity(self) -> dict[str, str]: ...


class ImageFiles:
    """Files, each decoded to a square of ``size`` pixels; crop "none" keeps them as they are, of any size."""

    def __init__(
        self, files: Sequence[Path], crop: Crop, size: int | None = None, left_out: Mapping[str, int] | None = None
    ) -> None:
        """left_out: number of other files in the folder, by kind."""
        self.files, self.crop, self.size, self.left_out = files, crop, size, dict(left_out or {})

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: range) -> list[Image]:
        """Decode these images. Raises ValueError, with the path, for a file that cannot be decoded."""
        return [self._decode(self.files[i]) for i in index]

    def identity(self) -> dict[str, str]:
        """The sha256 of the files' contents, in order, and how they are prepared. Reads all of them."""
        digest, turned = hashlib.sha256(), 0
        for file in self.files:
            data = file.read_bytes()
            digest.update(hashlib.sha256(data).digest())
            turned += read_orientation(data) != 1
        found = {"images_sha256": digest.hexdigest(), "crop": f"{self.crop} {self.size or ''}".strip()}
        return {**found, "decoder": "as shown", **({"turned_by_exif": str(turned)} if turned else {})}

    @property
    def unread(self) -> int:
        """Number of pictures among the files that are skipped."""
        return sum(count for name, count in self.left_out.items() if name in _UNREAD)

    def _decode(self, file: Path) -> Image:
        try:
            data = file.read_bytes()
            if self.crop == "center" and self.size:
                return decode_image(data, self.size, "center").permute(1, 2, 0).numpy()
            rgb = decode_whole(data)
        except (OSError, SampleError) as error:
            raise ValueError(f"{file}: {error}") from None
        if self.crop == "adm" and self.size:
            return adm_crop(Pil.fromarray(rgb), self.size)
        if self.size and rgb.shape[:2] != (self.size, self.size):
            raise ValueError(f"{file}: {rgb.shape[1]}x{rgb.shape[0]} pixels, expected {self.size}x{self.size}")
        return rgb


class NpzImages:
    """``arr_0`` of an npz file, (N, H, W, 3) uint8, memory-mapped if it is not compressed."""

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.path, self._array = path, _map_member(path, "arr_0")
        shape = self._array.shape
        if self._array.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"{path}: arr_0 is {self._array.dtype} {shape}, expected uint8 (N, height, width, 3)")
        if not len(self._array):
            raise ValueError(f"{path}: arr_0 contains no images")
        if size and shape[1:3] != (size, size):
            raise ValueError(f"{path}: images of {shape[2]}x{shape[1]} pixels, expected {size}x{size}")

    def __len__(self) -> int:
        return len(self._array)

    def read(self, index: range) -> list[Image]:
        return list(np.array(self._array[index.start : index.stop]))

    def identity(self) -> dict[str, str]:
        """The sha256 of the file."""
        with self.path.open("rb") as file:
            return {"images_sha256": hashlib.file_digest(file, "sha256").hexdigest(), "crop": "none"}


def open_images(path: Path, crop: Crop, size: int | None = None) -> ImageSet:
    """Open an npz file's images, or all image files under a folder, by name; other files are counted.

    Raises ValueError if there is no image.
    """
    if path.suffix == ".npz" and path.is_file():
        return NpzImages(path, size)
    if not path.is_dir():
        raise ValueError(f"{path}: it is neither a folder nor an npz file")
    files, left_out = [], Counter[str]()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        if file.name in _OF_SAMPLES:
            left_out[file.name] += 1
        elif file.suffix.lower() in _EXTENSIONS:
            files.append(file)
        else:
            left_out[file.suffix.lower() or file.name] += 1
    if not files:
        told = f"; {counted(left_out)}" if left_out else ""
        raise ValueError(f"{path}: there are no images in it ({', '.join(sorted(_EXTENSIONS))}){told}")
    return ImageFiles(files, crop, size, left_out)


def counted(left_out: Mapping[str, int]) -> str:
    """A text such as "3 .heic, 1 grid.png"."""
    return ", ".join(f"{count} {name}" for name, count in sorted(left_out.items()))


def adm_crop(image: Pil.Image, size: int) -> Image:
    """ADM's preparation of ImageNet: halved by a box filter while twice too large, then bicubic, centre square."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Pil.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Pil.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def npz_members(path: Path) -> set[str]:
    """The names of an npz file's arrays. Raises ValueError if it is not an npz file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path}: it is not an npz file: {error}") from None


def _map_member(path: Path, name: str) -> np.ndarray:
    if name not in npz_members(path):
        raise ValueError(f"{path}: it has no images ({name}); it contains {', '.join(sorted(npz_members(path)))}")
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type != zipfile.ZIP_STORED:
        with np.load(path, allow_pickle=False) as arrays:
            array: np.ndarray = arrays[name]
        return array
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)  # the lengths of the name and of the extra field end the local header
        name_length, extra_length = np.frombuffer(file.read(4), "<u2")
        file.seek(int(name_length) + int(extra_length), 1)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError(f"{path}: {name} contains objects, not numbers")
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def write_npz(path: Path, shape: tuple[int, int, int, int], chunks: Iterable[np.ndarray]) -> None:
    """Write ADM's layout: ``arr_0`` of ``shape`` (N, H, W, 3) uint8, from chunks in order, one in memory at a time."""
    part = temporary(path)
    with (
        zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk).tobytes())
    part.replace(path)
