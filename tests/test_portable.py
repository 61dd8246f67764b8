"""An exported folder in diffusers: alone, and against `dico sample`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dico_t2i import cli
from dico_t2i.config import parse_config
from dico_t2i.export import write_folder
from dico_t2i.inline import InlineError, standalone
from dico_t2i.models import DiCo
from tests.small_models import save_autoencoder

TREE = {
    "name": "small",
    "model": {
        "hidden_size": 8,
        "depths": [1, 1, 1, 1, 1],
        "mlp_ratio": 2,
        "condition": "text",
        "text_dim": 16,
        "pooled_dim": 16,
        "pooled_text": True,
    },
    "text_encoder": {"weights": "seeded", "seeded": {"width": 16, "layers": 1, "heads": 2}},
    "data": {"path": "data/small", "image_size": 32, "streams": 8},
    "train": {"duration": {"steps": 5}, "global_batch": 8},
    "sampler": {"kind": "iddpm", "steps": 4, "guidance": 3.0},
}
PROMPTS = ["a red circle", "two dogs, on a beach!"]


def write_export(out, tree, **changes):
    """An exported folder of a model whose every weight is random and in use."""
    config = parse_config({**tree, **changes}, "test")
    torch.manual_seed(0)
    parameters = {name: 0.3 * torch.randn_like(p) for name, p in DiCo(config.model).named_parameters()}
    shapes = {name: p.shape for name, p in parameters.items()}
    origin = {"run": config.name, "step": 5, "images": 40, "weights": "ema_0.9999"}
    metrics = {"step": 4, "loss": 0.25}
    write_folder(out, config, shapes, (p.numpy() for p in parameters.values()), origin, metrics)
    return out


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("portable")
    path = str(save_autoencoder(folder / "autoencoder"))
    return write_export(folder / "text", TREE, autoencoder={"path": path})


@pytest.fixture(scope="module")
def class_model(tmp_path_factory):
    model = {"hidden_size": 8, "depths": [1, 1, 1, 1, 1], "mlp_ratio": 2, "in_channels": 3, "learn_sigma": False}
    out = tmp_path_factory.mktemp("portable") / "class"
    return write_export(
        out,
        TREE,
        model=model,
        autoencoder={"kind": "pixels"},
        diffusion={"steps": 100, "schedule": "cosine", "prediction": "x0"},
    )


def sampled(model, out, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["sample", "--checkpoint", str(model), "--out", str(out), "--seed", "7", *arguments])
    assert ended.value.code == 0
    return np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("0*.png"))])


ALONE = """
import sys

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dico_t2i", "deepspeed", "pydantic", "webdataset", "open_clip"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Forbid())
import json
import numpy as np
from diffusers import DiffusionPipeline

folder, out, calls = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
assert not any(name.split(".")[0] == "dico_t2i" for name in sys.modules)
images = [np.stack([np.asarray(image) for image in pipeline(seed=7, **call).images]) for call in calls]
np.savez(out, *images)
"""


def alone(model, folder, calls):
    """The images of calls of the pipeline in a process that cannot import this package."""
    folder.mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DICO_WEIGHTS")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-I", "-c", ALONE, str(model), str(folder / "images.npz"), json.dumps(calls)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "images.npz") as images:
        return list(images.values())


def test_a_text_folder_runs_without_this_package_and_gives_the_pictures_of_dico_sample(text_model, tmp_path):
    samplers = [("iddpm", "4"), ("ddim", "3"), ("dpm++", "5")]
    calls = [
        {"prompt": PROMPTS, "num_images_per_prompt": 2, "sampler": kind, "num_inference_steps": int(steps)}
        for kind, steps in samplers
    ]
    calls.append({"prompt": PROMPTS[0], "guidance_scale": 1.0})
    *images, unguided = alone(text_model, tmp_path / "alone", calls)
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    for (kind, steps), got in zip(samplers, images, strict=True):
        ours = sampled(text_model, tmp_path / kind, *prompts, "--per-prompt", "2", "--sampler", kind, "--steps", steps)
        assert got.shape == (4, 32, 32, 3)
        assert got.std() > 10
        np.testing.assert_array_equal(got, ours)
    np.testing.assert_array_equal(
        unguided, sampled(text_model, tmp_path / "plain", "--prompt", PROMPTS[0], "--guidance", "1")
    )


def test_a_class_folder_knows_its_classes_by_name(class_model, tmp_path):
    calls = [{"class_labels": ["golden retriever", 3]}, {"class_labels": "tench", "height": 48, "width": 64}]
    images, other_size = alone(class_model, tmp_path / "alone", calls)
    ours = sampled(class_model, tmp_path / "ours", "--labels", "golden retriever", "3")
    np.testing.assert_array_equal(images, ours)
    assert other_size.shape == (1, 48, 64, 3)
