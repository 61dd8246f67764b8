"""The reader of two objects, and the measures of binding, relation and word order."""

from dataclasses import replace

import numpy as np
import pytest

from data_prep.shapes_scene import exchanged, held_out_pairs, held_out_prompts, is_held_out, render
from evals.shapes.pairs import pair_accuracy


def drawn(scenes, size=16):
    rng = np.random.default_rng(0)
    return np.stack([render(scene, size, rng) for scene in scenes])


PAIRS = [scene for _, scene in held_out_pairs(60, seed=3)]


@pytest.mark.parametrize("size", [16, 32])
def test_real_renderings_are_read(size):
    scenes = PAIRS[:20] if size == 32 else PAIRS
    assert min(pair_accuracy(drawn(scenes, size), scenes).values()) >= 0.97


def test_noise_does_not_disturb_the_reader():
    images = drawn(PAIRS)
    noisy = np.clip(images + np.random.default_rng(0).normal(0, 10, images.shape), 0, 255).astype(np.uint8)
    assert min(pair_accuracy(noisy, PAIRS).values()) >= 0.95


def test_exchanged_objects_are_bound_but_in_the_wrong_relation():
    right = {"binding": 1.0, "relation": 0.0, "pair": 0.0, "order": 0.0}
    assert pair_accuracy(drawn(PAIRS), [exchanged(scene) for scene in PAIRS]) == right


def test_exchanged_colours_are_in_the_wrong_places_and_on_the_wrong_objects():
    different = [scene for scene in PAIRS if scene.objects[0].shape != scene.objects[1].shape][:10]
    swapped = []
    for scene in different:
        first, second = scene.objects
        objects = (replace(first, colour=second.colour), replace(second, colour=first.colour))
        swapped.append(replace(scene, objects=objects))
    assert set(pair_accuracy(drawn(swapped), different).values()) == {0.0}


def test_one_object_is_no_pair():
    single = [scene for _, scene in held_out_prompts(40, seed=0)]
    assert set(pair_accuracy(drawn(single), PAIRS[:40]).values()) == {0.0}


def test_twins_have_the_same_words_in_another_order_and_are_held_out():
    prompts = held_out_pairs(40, seed=0)
    for (prompt, scene), (twin, other) in zip(prompts[::2], prompts[1::2], strict=True):
        assert sorted(prompt.replace("an ", "a ").split()) == sorted(twin.replace("an ", "a ").split())
        assert prompt != twin
        assert is_held_out(scene)
        assert other == exchanged(scene)


def test_numbers_must_agree():
    with pytest.raises(ValueError, match="1 images for 0 scenes"):
        pair_accuracy(np.zeros((1, 16, 16, 3), dtype=np.uint8), [])
