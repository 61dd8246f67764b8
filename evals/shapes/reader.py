"""Reads what an image of coloured shapes shows, by comparison with the renderer's own colours and shapes.

Nothing is learned or fitted to a model; the thresholds follow from the geometry of the scenes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from data_prep.shapes_scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Palette, coverage

MIN_CONTRAST = 40.0  # RGB distance; objects and backgrounds are at least 100 apart
MIN_OVERLAP = 0.5  # intersection over union; the shapes least alike, cross and square, reach 0.53

RADII = (0.5 * min(SIZES.values()), 1.5 * max(SIZES.values()))  # a speck or a filled image is not a shape


@dataclass(frozen=True)
class Reading:
    """The properties that an image shows; None for those that cannot be recognised."""

    background: str
    colour: str | None = None
    shape: str | None = None
    place: str | None = None
    size: str | None = None


def read(image: NDArray[np.uint8], colours: Palette = COLOURS) -> Reading:
    """Read the background and the one object of a square image, (size, size, 3) uint8."""
    pixels = image.astype(np.float64)
    ground = _border_colour(pixels)
    background = _nearest(ground, BACKGROUNDS)
    contrast = np.linalg.norm(pixels - ground, axis=-1)
    if contrast.max() < MIN_CONTRAST:
        return Reading(background)
    paint = np.median(pixels[contrast > 0.8 * contrast.max()], axis=0)
    colour = _nearest(paint, colours)
    mask = _soft_mask(pixels, ground, paint)
    fits = {shape: _fit(mask, shape) for shape in SHAPES}
    shape, (overlap, centre, radius) = max(fits.items(), key=lambda item: item[1][0])
    if overlap < MIN_OVERLAP or not RADII[0] <= radius <= RADII[1]:
        return Reading(background, colour)
    place = min(PLACES, key=lambda name: float(np.linalg.norm(np.subtract(PLACES[name], centre))))
    size = min(SIZES, key=lambda name: abs(SIZES[name] - radius))
    return Reading(background, colour, shape, place, size)


def read_pair(image: NDArray[np.uint8]) -> tuple[Reading, ...]:
    """Read two small objects, side by side or one above the other; empty where no two shapes are at such places.

    Each half of the image is read by itself, as if the other half were background.
    """
    for axis, places in ((1, ("left", "right")), (0, ("top", "bottom"))):
        halves = tuple(read(half) for half in _halves(image, axis))
        if tuple(half.place for half in halves) == places:
            return halves
    return ()


def _halves(image: NDArray[np.uint8], axis: int) -> Iterator[NDArray[np.uint8]]:
    ground = _border_colour(image.astype(np.float64)).round().astype(np.uint8)
    second = np.arange(len(image)) >= len(image) // 2
    for hidden in (second, ~second):
        hidden = hidden[:, None, None] if axis == 0 else hidden[None, :, None]
        yield np.where(hidden, ground, image)


def _border_colour(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    inside = np.zeros(pixels.shape[:2], dtype=bool)
    inside[1:-1, 1:-1] = True
    return np.median(pixels[~inside], axis=0)


def _nearest(colour: NDArray[np.float64], palette: Palette) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(colour - palette[name])))


def _soft_mask(
    pixels: NDArray[np.float64], ground: NDArray[np.float64], paint: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The share of the object in each pixel, (size, size), by projection on the line between the two colours.

    Pixels of any other colour that is as far from the ground as the paint also count as object: a second object is part
    of the mask. Pixels that do not touch a mostly covered pixel are 0, so that faint noise has no area.
    """
    line = paint - ground
    share = (pixels - ground) @ line / (line @ line)
    contrast = np.linalg.norm(pixels - ground, axis=-1) / np.linalg.norm(line)
    mask = np.clip(np.where(contrast > 0.5, contrast, share), 0, 1)
    near = binary_dilation(mask > 0.5, structure=np.ones((3, 3)))
    return np.where(near, mask, 0)


def _fit(mask: NDArray[np.float64], shape: str) -> tuple[float, tuple[float, float], float]:
    """The shape with the mask's area and centroid: its intersection over union with the mask, its centre and radius."""
    size = len(mask)
    axis = (np.arange(size) + 0.5) / size
    total = mask.sum()
    x, y = float(mask.sum(axis=0) @ axis / total), float(mask.sum(axis=1) @ axis / total)
    area, drop = _unit_area_and_centroid(shape)
    radius = float(np.sqrt(total / size**2 / area))
    centre = (x, y - drop * radius)
    template = coverage(shape, centre, radius, size)
    overlap = float(np.minimum(mask, template).sum() / np.maximum(mask, template).sum())
    return overlap, centre, radius


@lru_cache
def _unit_area_and_centroid(shape: str) -> tuple[float, float]:
    """The area of a shape of radius 1, and how far its centroid lies below its middle."""
    size, radius = 128, 0.25
    mask = coverage(shape, (0.5, 0.5), radius, size)
    axis = (np.arange(size) + 0.5) / size - 0.5
    return float(mask.sum() / size**2 / radius**2), float(mask.sum(axis=1) @ axis / mask.sum() / radius)
