"""Measures whether images of two shapes bind each property to its object, and whether the objects are in place."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.shapes_scene import Scene
from evals.shapes.reader import read_pair

PAIR_MEASURES = ("binding", "relation", "pair", "order")


def pair_accuracy(images: NDArray[np.uint8], scenes: Sequence[Scene]) -> dict[str, float]:
    """The shares of images with every attribute on its object, with the relation right, and with both.

    images (N, size, size, 3) uint8, for the scenes of ``held_out_pairs``. binding: the image shows two objects, with
    the colours and the shapes that the scene's two objects have. relation: the colours are at their places; no two
    objects of a scene have the same colour. pair: binding, relation and background. order: the share of prompts and
    their twins, with the same words in another order, whose relations are both right. Raises ValueError unless there
    is one image for each scene.
    """
    if len(images) != len(scenes) or not scenes:
        raise ValueError(f"{len(images)} images for {len(scenes)} scenes; expected equal numbers, and at least one")
    right = np.array([_compare(image, scene) for image, scene in zip(images, scenes, strict=True)])
    order = right[:, 1].reshape(-1, 2).all(axis=1).mean()
    return dict(zip(PAIR_MEASURES, (*right.mean(axis=0).tolist(), float(order)), strict=True))


def _compare(image: NDArray[np.uint8], scene: Scene) -> tuple[bool, bool, bool]:
    seen = read_pair(image)
    binding = sorted((o.colour or "", o.shape or "") for o in seen) == sorted(
        (o.colour, o.shape) for o in scene.objects
    )
    relation = {o.place: o.colour for o in seen} == {o.place: o.colour for o in scene.objects}
    return binding, relation, binding and relation and seen[0].background == scene.background
