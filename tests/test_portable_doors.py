"""The exported pipeline refuses what the command line refuses, before the network runs."""

import math
import re

import numpy as np
import pytest
import torch

from dico_t2i.config import SamplerConfig
from dico_t2i.pipeline import DiCoPipeline
from tests.small_models import save_autoencoder
from tests.test_portable import TREE, write_export


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doors")
    tree = {**TREE, "autoencoder": {"path": str(save_autoencoder(folder / "vae"))}}
    made = DiCoPipeline.from_pretrained(write_export(folder / "export", tree))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory):
    model = {"hidden_size": 8, "depths": [1, 1, 1, 1, 1], "mlp_ratio": 2, "in_channels": 3, "learn_sigma": False}
    tree = {**TREE, "model": model, "autoencoder": {"kind": "pixels"}}
    made = DiCoPipeline.from_pretrained(write_export(tmp_path_factory.mktemp("doors") / "export", tree))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": [None, "x"]}, "prompt: number 0 is None, not a text"),
        ({"prompt": ["x", 3]}, "prompt: number 1 is 3"),
        ({"prompt": 3}, "prompt: number 0 is 3"),
        ({"prompt": []}, "prompt: the list is empty"),
        ({"prompt": ()}, "prompt: the list is empty"),
        ({"prompt": "caf\udce9"}, "0xe9 is not UTF-8"),
        ({"negative_prompt": [None]}, "negative_prompt: number 0 is None"),
        ({"guidance_scale": math.nan}, "guidance_scale: nan is not a number of 0 or more"),
        ({"guidance_scale": math.inf}, "guidance_scale: inf"),
        ({"guidance_scale": -1}, "guidance_scale: -1"),
        ({"guidance_scale": "3"}, "guidance_scale: '3'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt: must be at least 1, not 0"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt: 1.5 is not a whole number"),
        ({"num_inference_steps": 0}, "num_inference_steps: must be at least 1"),
        ({"num_inference_steps": 1}, "sampler.steps: 1, but iddpm takes 2 to"),
        ({"num_inference_steps": 1001}, "sampler.steps: 1001"),
        ({"seed": 1.5}, "seed: 1.5 is not a whole number"),
        ({"seed": 1 << 63}, "seed: 9223372036854775808 must lie between"),
        ({"seed": (1 << 63) - 1, "num_images_per_prompt": 2}, "must lie between"),
        ({"seed": [1, 2]}, "2 seeds or generators for 1 images"),
        ({"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}, "prompt_embeds unknown; use latents"),
        ({"output_type": "foo"}, "output_type: 'foo' is not one of pil, np, pt, latent"),
        ({"height": 0}, "height: must be at least 1, not 0"),
        ({"width": 33}, "must be divisible by 32"),
    ],
)
def test_bad_calls_are_told_before_the_network_runs(pipeline, monkeypatch, call, message):
    monkeypatch.setattr(pipeline.transformer, "forward", None)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        pipeline(**{"prompt": "a", **call})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [np.int64(7), np.uint8(7), torch.tensor(7), [np.int32(7)], np.array([7])])
def test_seeds_of_other_integer_types(pipeline, seed):
    images = pipeline("a", seed=seed, output_type="np").images
    assert np.array_equal(images, pipeline("a", seed=7, output_type="np").images)


@pytest.mark.parametrize("label", [[], [1000], [-1], [1.5], [None], ["no such class"]])
def test_labels_that_are_none(of_classes, label):
    with pytest.raises(ValueError, match="class_labels"):
        of_classes(class_labels=label)


@pytest.mark.parametrize("label", [np.int64(3), [np.uint8(3)], np.array([3]), torch.tensor([3]), "3"])
def test_labels_of_other_integer_types(of_classes, label):
    images = of_classes(class_labels=label, seed=1, output_type="np").images
    assert np.array_equal(images, of_classes(class_labels=3, seed=1, output_type="np").images)


def test_another_scheduler_keeps_its_own_steps(pipeline):
    from diffusers import EulerDiscreteScheduler

    own = pipeline.scheduler
    pipeline.scheduler = EulerDiscreteScheduler.from_config(own.config)
    assert len(pipeline("a", seed=1, num_inference_steps=1, output_type="np").images) == 1
    pipeline.scheduler = own


def test_what_the_command_line_refuses_of_guidance():
    for guidance in (math.nan, -1, math.inf):
        with pytest.raises(ValueError, match="guidance"):
            SamplerConfig(guidance=guidance)
