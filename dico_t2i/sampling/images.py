"""Writes sampled images as single PNGs and as a grid."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dico_t2i.files import temporary

_MOST = 64  # most images of a grid


def save_images(images: Tensor, captions: Sequence[str], seeds: Sequence[int], folder: Path) -> None:
    """Write numbered PNGs, with prompt and seed as metadata, and a grid. images (N, 3, H, W) uint8."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, caption, seed) in enumerate(zip(images, captions, seeds, strict=True)):
        save_image(image, caption, seed, image_path(folder, number))
    make_grid(images, captions).save(folder / "grid.png")


def image_path(folder: Path, number: int) -> Path:
    """The path of an image in a folder of samples."""
    return folder / f"{number:05d}.png"


def save_image(image: Tensor, caption: str, seed: int, path: Path) -> None:
    """Write a PNG atomically, with its prompt and seed as metadata. image (3, H, W) uint8."""
    info = PngInfo()
    info.add_itxt("prompt", caption)
    info.add_text("seed", str(seed))
    part = temporary(path)
    to_pil(image).save(part, "PNG", pnginfo=info)
    part.replace(path)


def save_grid(files: Sequence[Path], folder: Path) -> None:
    """Write grid.png of the first of these files, which ``save_image`` has written."""
    images, captions = [], []
    for file in files[:_MOST]:
        with Image.open(file) as image:
            captions.append(getattr(image, "text", {}).get("prompt", ""))
            images.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
    make_grid(torch.stack(images), captions).save(folder / "grid.png")


def make_grid(images: Tensor, captions: Sequence[str], most: int = _MOST) -> Image.Image:
    """A grid of the first ``most`` images, at least 128 pixels each, with their captions underneath."""
    images = images[:most]
    scale = max(1, -(-128 // images.shape[-1]))
    H, W = images.shape[2] * scale, images.shape[3] * scale
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    line, lines = 11, 4
    grid = Image.new("RGB", (columns * (W + 4), rows * (H + line * lines + 4)), "white")
    draw = ImageDraw.Draw(grid)
    for number, (image, caption) in enumerate(zip(images, captions, strict=False)):
        x, y = number % columns * (W + 4), number // columns * (H + line * lines + 4)
        grid.paste(to_pil(image).resize((W, H), Image.Resampling.NEAREST), (x, y))
        for row, text in enumerate(_wrap(caption, W // 6)[:lines]):
            draw.text((x, y + H + row * line), text.encode("ascii", "replace").decode(), fill="black", font_size=10)
    return grid


def to_pil(image: Tensor) -> Image.Image:
    """An image (3, H, W) uint8 as one of Pillow."""
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(8, width))
