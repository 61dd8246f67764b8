"""Writes sampled images as single PNGs and as a grid."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor


def save_images(images: Tensor, captions: Sequence[str], seeds: Sequence[int], folder: Path) -> None:
    """Write numbered PNGs, with prompt and seed as metadata, and a grid. images (N, 3, H, W) uint8."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, caption, seed) in enumerate(zip(images, captions, seeds, strict=True)):
        info = PngInfo()
        info.add_itxt("prompt", caption)
        info.add_text("seed", str(seed))
        _to_pil(image).save(folder / f"{number:05d}.png", pnginfo=info)
    make_grid(images, captions).save(folder / "grid.png")


def make_grid(images: Tensor, captions: Sequence[str], most: int = 64) -> Image.Image:
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
        grid.paste(_to_pil(image).resize((W, H), Image.Resampling.NEAREST), (x, y))
        for row, text in enumerate(_wrap(caption, W // 6)[:lines]):
            draw.text((x, y + H + row * line), text.encode("ascii", "replace").decode(), fill="black", font_size=10)
    return grid


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(8, width))
