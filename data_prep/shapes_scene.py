"""Scenes of coloured shapes: their objects, pixels and captions, and the combinations that are never trained on.

Coordinates are fractions of the image's side, x to the right and y downwards. A shape is a region of the plane around
its centre, in units of its radius.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float64]
Palette = Mapping[str, tuple[int, int, int]]

# Objects and backgrounds have no colour name in common, so a word of a prompt says which of the two it means.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 25, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 230, 40),
    "green": (20, 140, 40),
    "cyan": (50, 215, 230),
    "blue": (30, 60, 220),
    "purple": (130, 30, 160),
    "pink": (255, 130, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "black": (0, 0, 0),
}
SHAPES: dict[str, Callable[[Plane, Plane], NDArray[np.bool_]]] = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.92,
    "triangle": lambda x, y: (y <= 0.95) & (abs(x) <= (y + 0.95) / 1.9 * 1.05),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.36) & (np.maximum(abs(x), abs(y)) <= 1.05),
}
SIZES: dict[str, float] = {"small": 0.17, "large": 0.24}  # radius
PLACES: dict[str, tuple[float, float]] = {
    "left": (0.29, 0.5),
    "right": (0.71, 0.5),
    "top": (0.5, 0.29),
    "bottom": (0.5, 0.71),
    "centre": (0.5, 0.5),
}
POSITION_JITTER = 0.02  # largest shift in x and in y
SIZE_JITTER = 0.05  # largest relative change of the radius
SUPERSAMPLING = 8  # points per pixel and axis

_PLACE_PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}


@dataclass(frozen=True)
class Object:
    """One shape; every field is a key of the table with its name."""

    size: str
    colour: str
    shape: str
    place: str


@dataclass(frozen=True)
class Scene:
    """One object anywhere, or two small ones side by side or one above the other, on a plain background."""

    background: str
    objects: tuple[Object, ...]


def coverage(shape: str, centre: tuple[float, float], radius: float, size: int) -> Plane:
    """The share of each pixel that a shape covers: (size, size) float64 in [0, 1]."""
    axis = (np.arange(size * SUPERSAMPLING) + 0.5) / (size * SUPERSAMPLING)
    x, y = (axis[None, :] - centre[0]) / radius, (axis[:, None] - centre[1]) / radius
    points = SHAPES[shape](x, y).reshape(size, SUPERSAMPLING, size, SUPERSAMPLING)
    return points.mean(axis=(1, 3))


def render(scene: Scene, size: int, rng: np.random.Generator, colours: Palette = COLOURS) -> NDArray[np.uint8]:
    """The anti-aliased image of a scene, (size, size, 3) uint8; ``rng`` draws the jitter of place and size."""
    image = np.empty((size, size, 3))
    image[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        x, y = PLACES[item.place] + rng.uniform(-POSITION_JITTER, POSITION_JITTER, 2)
        radius = SIZES[item.size] * (1 + rng.uniform(-SIZE_JITTER, SIZE_JITTER))
        mask = coverage(item.shape, (x, y), radius, size)[..., None]
        image = image * (1 - mask) + np.array(colours[item.colour]) * mask
    return image.round().astype(np.uint8)


def captions(scene: Scene) -> list[str]:
    """All captions of a scene."""
    if len(scene.objects) == 1:
        return _single_captions(scene.background, scene.objects[0])
    return _pair_captions(scene.background, *scene.objects)


def _single_captions(background: str, item: Object) -> list[str]:
    thing = f"{item.size} {item.colour} {item.shape}"
    where = _PLACE_PHRASES[item.place]
    return [
        f"a {thing} {where} on a {background} background",
        f"a {background} background with a {thing} {where}",
        f"{where}, a {thing} against {background}",
        f"{thing}, {item.place}, {background} background",
    ]


def _pair_captions(background: str, first: Object, second: Object) -> list[str]:
    a, b = (f"{_article(o.colour)} {o.colour} {o.shape}" for o in (first, second))
    near, far = ("to the left of", "to the right of") if first.place == "left" else ("above", "below")
    return [
        f"{a} {near} {b} on a {background} background",
        f"{b} {far} {a} on a {background} background",
        f"a {background} background with {a} {near} {b}",
        f"{b} {far} {a} against {background}",
    ]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def parse(prompt: str) -> Scene:
    """The single-object scene that a prompt asks for, in any wording that names each property once.

    Raises ValueError that names the property that is absent or named twice.
    """
    words = prompt.lower().replace(",", " ").replace(".", " ").split()

    def one(what: str, names: Collection[str]) -> str:
        found = [word for word in words if word in names]
        if len(found) != 1:
            raise ValueError(f"prompt {prompt!r}: expected one {what} of {', '.join(names)}, found {found or 'none'}")
        return found[0]

    item = Object(
        size=one("size", SIZES),
        colour=one("colour", COLOURS),
        shape=one("shape", SHAPES),
        place=one("place", PLACES),
    )
    return Scene(one("background", BACKGROUNDS), (item,))


def is_held_out(scene: Scene) -> bool:
    """Whether a scene is kept out of training, because an object's combination of colour, shape and background is.

    One colour is held out for each shape and background, 12 of the 96 combinations. Every pair of two properties occurs
    in training, so held-out prompts ask for known words in a new combination.
    """
    colours, shapes, backgrounds = list(COLOURS), list(SHAPES), list(BACKGROUNDS)
    ground = backgrounds.index(scene.background)
    return any(
        (colours.index(o.colour) + 3 * shapes.index(o.shape) + 2 * ground) % len(colours) == 0 for o in scene.objects
    )


def random_scene(rng: np.random.Generator, two_objects: float, held_out: bool) -> Scene:
    """A scene from the training combinations, or from the held-out ones.

    ``two_objects`` is the share of scenes with two objects.
    """
    pair = rng.random() < two_objects
    while True:
        scene = _random_pair(rng) if pair else _random_single(rng)
        if is_held_out(scene) == held_out:
            return scene


def _choice(rng: np.random.Generator, names: Collection[str]) -> str:
    return list(names)[rng.integers(len(names))]


def _random_single(rng: np.random.Generator) -> Scene:
    item = Object(*(_choice(rng, names) for names in (SIZES, COLOURS, SHAPES, PLACES)))
    return Scene(_choice(rng, BACKGROUNDS), (item,))


def _random_pair(rng: np.random.Generator) -> Scene:
    colours = [list(COLOURS)[i] for i in rng.choice(len(COLOURS), 2, replace=False)]
    places = ("left", "right") if rng.random() < 0.5 else ("top", "bottom")
    objects = (
        Object("small", colour, _choice(rng, SHAPES), place) for colour, place in zip(colours, places, strict=True)
    )
    return Scene(_choice(rng, BACKGROUNDS), tuple(objects))


def held_out_prompts(n: int, seed: int) -> list[tuple[str, Scene]]:
    """``n`` prompts for held-out single-object scenes, each with its scene.

    The 120 held-out scenes come in random order, each equally often (to within one), and each time with a random
    wording.
    """
    scenes = [
        Scene(background, (Object(*properties),))
        for background, *properties in product(BACKGROUNDS, SIZES, COLOURS, SHAPES, PLACES)
    ]
    scenes = [scene for scene in scenes if is_held_out(scene)]
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(scenes)) for _ in range(math.ceil(n / len(scenes)))])[:n]
    chosen = [scenes[i] for i in order]
    return [(wordings[rng.integers(len(wordings))], s) for s in chosen for wordings in [captions(s)]]


def held_out_pairs(n: int, seed: int) -> list[tuple[str, Scene]]:
    """``n`` prompts for held-out scenes of two objects, each with its scene; n must be even.

    Prompts 2 k and 2 k + 1 have the same words in another order: the two objects exchange their places.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for _ in range(n // 2):
        scene = random_scene(rng, two_objects=1.0, held_out=True)
        wording = rng.integers(len(captions(scene)))
        chosen += [(captions(each)[wording], each) for each in (scene, exchanged(scene))]
    return chosen


def exchanged(pair: Scene) -> Scene:
    """The scene in which the two objects have exchanged their places."""
    first, second = pair.objects
    return replace(pair, objects=(replace(second, place=first.place), replace(first, place=second.place)))
