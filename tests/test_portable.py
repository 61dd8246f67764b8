"""An exported folder in diffusers: alone, and against `dico sample`."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dico_t2i import cli
from dico_t2i.config import load_config, parse_config
from dico_t2i.export.card import model_card
from dico_t2i.export.folder import write_folder
from dico_t2i.export.inline import InlineError, standalone
from dico_t2i.models import DiCo
from tests.encoders.test_text import PROJECTED, save_clip
from tests.models.test_ablations import SWITCHES
from tests.small_models import save_autoencoder

ROOT = Path(__file__).resolve().parents[1]
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
    parameters = {name: 0.1 * torch.randn_like(p) for name, p in DiCo(config.model).named_parameters()}
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


@pytest.fixture(scope="module")
def pooled_model(text_model, tmp_path_factory):
    """With kernels of 5x5 that pooling makes of the tokens."""
    out = tmp_path_factory.mktemp("portable") / "pooled"
    model = {**TREE["model"], "text_kernel": 5, "text_pooling": "attention"}
    return write_export(out, TREE, model=model, autoencoder={"path": str(text_model / "vae")})


@pytest.fixture(scope="module")
def flow_model(tmp_path_factory):
    model = {"hidden_size": 8, "depths": [1, 1, 1, 1, 1], "mlp_ratio": 2, "in_channels": 3, "learn_sigma": False}
    out = tmp_path_factory.mktemp("portable") / "flow"
    sampler = {"kind": "euler", "steps": 4, "guidance": 2.0}
    flow = {"autoencoder": {"kind": "pixels"}, "diffusion": {"kind": "flow"}, "sampler": sampler}
    return write_export(out, TREE, model=model, **flow)


@pytest.fixture(autouse=True)
def exact_operators(monkeypatch):
    """Those of an exported folder; what --exact sets is undone."""
    monkeypatch.setenv("DICO_OPERATORS", "torch")


def sampled(model, out, *arguments, exact=True):
    how = ["--exact"] if exact else []
    with pytest.raises(SystemExit) as ended:
        cli.main(["sample", *how, "--checkpoint", str(model), "--out", str(out), "--seed", "7", *arguments])
    assert ended.value.code == 0
    return np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("0*.png"))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "1000"], "--labels 1000: this model's classes are 0 to 999"),
        (["--labels", "1", "--guidance", "-1"], "guidance: Input should be greater than or equal to 0"),
        (["--labels", "1", "--out", "{folder}/file/x"], "Not a directory"),
        (["--labels", "1", "--decode-batch", "0"], "--decode-batch: must be at least 1, not 0"),
        (["--labels", "1", "--batch", "many"], "--batch: 'many' is not a whole number"),
        (["--prompts", "{folder}/file"], "is not utf-8 text; save the file as UTF-8"),
    ],
)
def test_what_is_asked_wrongly_is_told_at_once(class_model, tmp_path, capsys, arguments, message):
    (tmp_path / "file").write_bytes(b"\xff\x00")
    given = [argument.format(folder=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        cli.main(["sample", "--checkpoint", str(class_model), "--out", str(tmp_path / "out"), *given])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


FORBID = """
import sys

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dico_t2i", "deepspeed", "pydantic", "webdataset", "open_clip"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Forbid())
"""
ALONE = """
import json
import sys
import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

images = []
for folder, calls in json.loads(sys.argv[1]):
    for call in calls:
        call.update({key: Image.open(call[key]) for key in ("image", "mask_image") if key in call})
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    images += [np.stack([np.asarray(image) for image in pipeline(seed=7, **call).images]) for call in calls]
assert not any(name.split(".")[0] == "dico_t2i" for name in sys.modules)
np.savez(sys.argv[2], *images)
"""
SAMPLERS = [("iddpm", 4), ("ddim", 3), ("dpm++", 5)]
TEXT_CALLS = [
    *({"prompt": PROMPTS, "num_images_per_prompt": 2, "sampler": s, "num_inference_steps": n} for s, n in SAMPLERS),
    {"prompt": PROMPTS[0], "guidance_scale": 1.0},
]
CLASS_CALLS = [{"class_labels": ["golden retriever", 3]}, {"class_labels": "tench", "height": 48, "width": 64}]
FLOW_SAMPLERS = ("euler", "heun", "dpm++", "euler_sde")
FLOW_CALLS = [{"class_labels": [3, 5], "sampler": sampler, "num_inference_steps": 5} for sampler in FLOW_SAMPLERS]


def images_of(code, work, folder, python=sys.executable):
    """The images of calls of pipelines, one after the other, by a Python of its own in an empty folder."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DICO_WEIGHTS")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    command = [python, "-I", "-c", code, json.dumps(work), str(folder / "images.npz")]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "images.npz") as images:
        return list(images.values())


def picture(height, width):
    """Noise."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save_drawing(folder):
    """Files of an image and of a mask, as arguments of a pipeline."""
    mask = Image.new("L", (32, 64))
    mask.paste(255, (3, 0, 20, 40))
    mask.save(folder / "mask.png")
    picture(64, 32).save(folder / "image.png")
    return {"image": str(folder / "image.png"), "mask_image": str(folder / "mask.png")}


@pytest.fixture(scope="module")
def alone(text_model, class_model, flow_model, pooled_model, tmp_path_factory):
    """The images of calls of the pipelines, in a process that cannot import this package."""
    work = [(str(text_model), TEXT_CALLS), (str(class_model), CLASS_CALLS), (str(flow_model), FLOW_CALLS)]
    work.append((str(pooled_model), [{"prompt": PROMPTS}]))
    folder = tmp_path_factory.mktemp("alone")
    work.append((str(text_model), [{"prompt": PROMPTS[0], "height": 64, **save_drawing(folder)}]))
    images = iter(images_of(FORBID + ALONE, work, folder))
    return [[next(images) for _ in calls] for _, calls in work]


@pytest.mark.long
def test_a_new_environment_of_diffusers_transformers_and_torch_is_enough(text_model, alone, tmp_path):
    """Of the locked versions, out of uv's cache; skipped where that is empty, rather than download torch again."""
    uv = [sys.executable, "-m", "uv", "--quiet", "--no-config"]
    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([*uv, "venv", "--python", sys.executable, str(python.parents[1])], check=True)
    install = ["pip", "install", "--offline", "--python", str(python), "--constraint", str(ROOT / "requirements.lock")]
    packages = ["diffusers", "transformers", "torch"]
    done = subprocess.run([*uv, *install, *packages], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"uv's cache has not all of it: {done.stderr.strip().splitlines()[-1]}")
    listed = subprocess.run([*uv, "pip", "list", "--python", str(python)], capture_output=True, text=True, check=True)
    assert not {"dico-t2i", "deepspeed", "open-clip-torch", "webdataset"} & set(listed.stdout.split())
    (images,) = images_of(ALONE, [(str(text_model), TEXT_CALLS[:1])], tmp_path, str(python))
    shutil.rmtree(python.parents[1])  # where links are not possible, gigabytes
    np.testing.assert_array_equal(images, alone[0][0])


def test_a_text_folder_runs_without_this_package_and_gives_the_pictures_of_dico_sample(text_model, alone, tmp_path):
    *images, unguided = alone[0]
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    for (kind, steps), got in zip(SAMPLERS, images, strict=True):
        options = ["--per-prompt", "2", "--sampler", kind, "--steps", str(steps)]
        ours = sampled(text_model, tmp_path / kind, *prompts, *options)
        assert got.shape == (4, 32, 32, 3)
        assert got.std() > 10
        np.testing.assert_array_equal(got, ours)
    plain = sampled(text_model, tmp_path / "plain", "--prompt", PROMPTS[0], "--guidance", "1")
    np.testing.assert_array_equal(unguided, plain)


def test_the_faster_operators_differ_by_rounding_alone(text_model, alone, tmp_path, monkeypatch):
    monkeypatch.delenv("DICO_OPERATORS")
    compiled = sampled(text_model, tmp_path / "fast", "--prompt", PROMPTS[0], "--guidance", "1", exact=False)
    assert np.abs(alone[0][-1].astype(int) - compiled).max() <= 1


def test_pooled_text_gives_the_same_pictures(pooled_model, alone, tmp_path):
    ours = sampled(pooled_model, tmp_path / "ours", *(part for prompt in PROMPTS for part in ("--prompt", prompt)))
    (images,) = alone[3]
    assert images.std() > 10
    np.testing.assert_array_equal(images, ours)


def test_a_class_folder_knows_its_classes_by_name(class_model, alone, tmp_path):
    images, other_size = alone[1]
    np.testing.assert_array_equal(images, sampled(class_model, tmp_path / "ours", "--labels", "golden retriever", "3"))
    assert other_size.shape == (1, 48, 64, 3)


def test_a_flow_runs_with_its_own_samplers(flow_model, alone, tmp_path):
    for sampler, got in zip(FLOW_SAMPLERS, alone[2], strict=True):
        options = ["--labels", "3", "5", "--sampler", sampler, "--steps", "5"]
        np.testing.assert_array_equal(got, sampled(flow_model, tmp_path / sampler, *options))
    assert "rectified flow, uniform times, predicts velocity" in (flow_model / "README.md").read_text()


@pytest.fixture(scope="module")
def pipeline(text_model):
    from dico_t2i.pipeline import DiCoPipeline

    loaded = DiCoPipeline.from_pretrained(text_model)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_this_package_runs_the_folder_with_its_own_code(pipeline, text_model, tmp_path):
    images = pipeline(PROMPTS, seed=7, output_type="np").images
    ours = sampled(text_model, tmp_path / "ours", *(part for prompt in PROMPTS for part in ("--prompt", prompt)))
    np.testing.assert_array_equal((images * 255).round().astype(np.uint8), ours)
    assert type(pipeline.transformer).__module__ == "dico_t2i.export.portable.transformer"


def test_the_text_tower_of_a_whole_clip_is_copied_with_its_projection(text_model, tmp_path):
    from dico_t2i.pipeline import DiCoPipeline

    clip, _ = save_clip(tmp_path / "clip")
    vae = {"path": str(text_model / "vae")}
    model = {**TREE["model"], "pooled_dim": PROJECTED}
    out = write_export(tmp_path / "out", TREE, model=model, text_encoder={"model": str(clip)}, autoencoder=vae)
    shutil.rmtree(clip)
    loaded = DiCoPipeline.from_pretrained(out)
    loaded.set_progress_bar_config(disable=True)
    image = np.asarray(loaded(PROMPTS[0], seed=7).images[0])
    np.testing.assert_array_equal(image, sampled(out, tmp_path / "ours", "--prompt", PROMPTS[0])[0])


def latents(pipeline, prompt=PROMPTS[0], **options):
    return pipeline(prompt, output_type="latent", return_dict=False, **options)[0]


def test_seeds_come_from_the_call_the_generator_or_torch(pipeline):
    several = latents(pipeline, seed=[5, 9], num_images_per_prompt=2)
    torch.testing.assert_close(several[1:], latents(pipeline, seed=9), rtol=1e-4, atol=1e-3)
    first, again, other = (latents(pipeline, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    each = [torch.Generator().manual_seed(s) for s in (1, 2)]
    both = latents(pipeline, PROMPTS[:1] * 2, generator=each)
    torch.testing.assert_close(both, torch.cat((first, other)), rtol=1e-4, atol=1e-3)
    torch.manual_seed(3)
    drawn = latents(pipeline)
    torch.manual_seed(3)
    assert torch.equal(drawn, latents(pipeline))
    with pytest.raises(ValueError, match="2 seeds or generators for 1 images"):
        latents(pipeline, seed=[1, 2])


def test_a_negative_prompt_takes_the_place_of_the_empty_one(pipeline):
    empty, named = latents(pipeline, seed=1, negative_prompt=""), latents(pipeline, seed=1, negative_prompt="blue")
    torch.testing.assert_close(latents(pipeline, seed=1), empty)
    assert not torch.allclose(empty, named)
    with pytest.raises(ValueError, match="3 for 1 prompts"):
        latents(pipeline, negative_prompt=["a", "b", "c"])


def test_other_sizes_and_forms_of_output(pipeline):
    images = pipeline(PROMPTS, seed=1, height=64, width=96, output_type="pt").images
    assert images.shape == (2, 3, 64, 96)
    assert 0 <= images.min() < images.max() <= 1
    assert pipeline(PROMPTS[0], height=64, width=96).images[0].size == (96, 64)
    with pytest.raises(ValueError, match="48x32 must be divisible by 32"):
        pipeline(PROMPTS[0], height=48)


@pytest.mark.parametrize("sampler", ["iddpm", "dpm++"])
def test_a_callback_sees_each_step_and_may_change_the_latents(pipeline, sampler):
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, timestep))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    result = latents(pipeline, seed=1, sampler=sampler, num_inference_steps=4, callback_on_step_end=watch)
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t in seen] == sorted((t for _, t in seen), reverse=True)
    assert not result.any()

    def look(pipe, step, timestep, tensors):
        seen.append(tensors)

    latents(pipeline, num_inference_steps=2, callback_on_step_end=look, callback_on_step_end_tensor_inputs=())
    assert seen[4:] == [{}, {}]


def test_a_scheduler_of_diffusers_takes_over_when_it_is_put_in(text_model):
    """DDIM of diffusers on all steps of a short process is our DDIM, up to its float32 schedule."""
    from diffusers import DDIMScheduler

    from dico_t2i.pipeline import DiCoPipeline

    pipeline = DiCoPipeline.from_pretrained(text_model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(diffusion={"steps": 40})
    config = {**pipeline.scheduler.config, "num_train_timesteps": 40, "beta_start": 0.1 / 40, "beta_end": 0.5}
    ours = latents(pipeline, seed=1, sampler="ddim", num_inference_steps=40)
    pipeline.scheduler = DDIMScheduler.from_config(config)
    pipeline.transformer.requires_grad_(False)
    theirs = latents(pipeline, seed=1, num_inference_steps=40)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3 * float(ours.abs().max()))
    assert torch.equal(latents(pipeline, seed=1, sampler="ddim", num_inference_steps=40), ours)


def test_arguments_that_do_not_fit_are_named(pipeline, class_model):
    from dico_t2i.pipeline import DiCoPipeline

    classes = DiCoPipeline.from_pretrained(class_model)
    with pytest.raises(ValueError, match="needs prompt, not class_labels"):
        pipeline(class_labels=3)
    with pytest.raises(ValueError, match="needs class_labels, not prompt"):
        classes("a dog")
    with pytest.raises(ValueError, match="'golden retreiver' is not a class"):
        classes(class_labels="golden retreiver")
    with pytest.raises(ValueError, match=r"1000 must be in 0\.\.999"):
        classes(class_labels=1000)
    with pytest.raises(ValueError, match="'euler' is not one of iddpm"):
        pipeline(PROMPTS[0], sampler="euler")
    with pytest.raises(ValueError, match="no model_index"):
        DiCoPipeline.from_pretrained(class_model.parent)


def test_encoders_may_stay_out_and_be_given(text_model, pipeline, tmp_path):
    from diffusers import DiffusionPipeline

    config = load_config(text_model / "config.yaml")
    weights = load_file(text_model / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    out, origin = tmp_path / "light", {"weights": "weight"}
    write_folder(out, config, shapes, (w.numpy() for w in weights.values()), origin, {}, encoders=False)
    assert not [name for name in ("vae", "text_encoder", "tokenizer") if (out / name).exists()]
    assert "vae = diffusers.AutoencoderKL.from_pretrained(" in (out / "README.md").read_text()
    parts = {name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer")}
    loaded = DiffusionPipeline.from_pretrained(out, trust_remote_code=True, **parts)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(latents(loaded, seed=1), latents(pipeline, seed=1))
    bare = DiffusionPipeline.from_pretrained(out, trust_remote_code=True, **dict.fromkeys(parts))
    with pytest.raises(ValueError, match="no text encoder"):
        bare(PROMPTS[0])


def test_a_network_of_several_encoders_is_not_fed_by_one(text_model, pipeline, tmp_path):
    from dico_t2i.pipeline import DiCoPipeline

    also = [{"kind": "t5", "tokens": 12, **TREE["text_encoder"]}]
    model = {**TREE["model"], "text_tokens": 89, "text_inputs": [[77, 16], [12, 16]], "text_kernel": 11}
    config = parse_config({**TREE, "model": model, "text_encoder": {**TREE["text_encoder"], "also": also}}, "test")
    parameters = dict(DiCo(config.model).named_parameters())
    arrays = (p.detach().numpy() for p in parameters.values())
    shapes = {name: p.shape for name, p in parameters.items()}
    write_folder(tmp_path / "out", config, shapes, arrays, {"weights": "weight"}, {}, encoders=False)
    parts = {name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer")}
    loaded = DiCoPipeline.from_pretrained(tmp_path / "out", **parts)
    with pytest.raises(ValueError, match="needs 89 tokens of width 16, but the encoder has"):
        loaded(PROMPTS[0])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "cut to 77 and 12 tokens" in card
    assert "trust_remote_code" not in card


def test_the_card_says_what_the_model_is(text_model):
    card = (text_model / "README.md").read_text()
    for line in ("| steps | 5 of 5 steps |", "| weights | ema_0.9999 |", "| loss | 0.25 |", "random and untrained"):
        assert line in card
    assert "No quality measure" in card
    assert "## Evaluations" not in card


def test_the_card_has_the_evaluations_and_says_what_they_are_worth(text_model):
    result = {"protocol": {"name": "coco"}, "protocol_hash": "ab12", "images": 30, "numbers": {"fid": 9, "is_std": 1}}
    result |= {"standard_errors": {"fid": 0.5}, "changes": ["fewer images"], "doubts": []}
    card = model_card(load_config(text_model / "config.yaml"), {"weights": "weight"}, {}, [], [result])
    assert "`coco ab12`, 30 images. **Not comparable**: fewer images" in card
    assert "| fid | 9.0000 ± 0.5 |" in card
    assert "is_std" not in card
    assert "No quality measure" not in card


def test_ablated_networks_are_copied_with_their_parts(tmp_path, monkeypatch):
    (tmp_path / "copied.py").write_text(standalone(["dico_t2i.export.portable.transformer.DiCoTransformer"], "doc"))
    monkeypatch.syspath_prepend(tmp_path)
    copied = importlib.import_module("copied")
    arguments = (torch.randn(1, 4, 12, 20), torch.tensor([3.0]), torch.randn(1, 77, 16), torch.randn(1, 16))
    for switches in SWITCHES:
        config = parse_config({**TREE, "model": {**TREE["model"], **switches}}, "test").model
        torch.manual_seed(0)
        ours, theirs = DiCo(config), copied.DiCoTransformer(network=config.model_dump())
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        theirs.load_state_dict(ours.state_dict())
        assert ours(*arguments).any()
        assert torch.equal(theirs(*arguments), ours(*arguments)), switches


def test_what_cannot_be_copied_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "inlinable"
    package.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("dico_t2i.export.inline.PACKAGE", "inlinable")
    modules = {
        "__init__": "",
        "a": "def same(): return 1\ndef one(): return same()",
        "b": "from inlinable.a import one\ndef same(): return 2\ndef two(): return one() + same()",
        "c": "def three():\n    from inlinable.a import one\n    return one()",
        "d": "from inlinable.a import one as uno\nfour = uno",
    }
    for name, source in modules.items():
        (package / f"{name}.py").write_text(source + "\n")
    assert "def same" in standalone(["inlinable.a.one"], "doc")
    for name, problem in (
        ("b.two", "same is defined in"),
        ("c.three", "inside a function"),
        ("d.four", "a different name"),
    ):
        with pytest.raises(InlineError, match=problem):
            standalone([f"inlinable.{name}"], "doc")
    with pytest.raises(InlineError, match="does not define five"):
        standalone(["inlinable.a.five"], "doc")


def test_a_mask_gives_the_pictures_of_dico_sample(text_model, alone, tmp_path):
    (images,) = alone[4]
    files = save_drawing(tmp_path)
    words = ["--prompt", PROMPTS[0], "--height", "64", "--init-image", files["image"], "--mask", files["mask_image"]]
    np.testing.assert_array_equal(images, sampled(text_model, tmp_path / "ours", *words))
    mask = np.asarray(Image.open(files["mask_image"])) > 0
    np.testing.assert_array_equal(images[0][~mask], np.asarray(picture(64, 32))[~mask])
    assert (images[0][mask] != np.asarray(picture(64, 32))[mask]).any()


def test_an_image_to_begin_with_gives_the_pictures_of_dico_sample(flow_model, tmp_path):
    """Of a model of pixels."""
    from dico_t2i.pipeline import DiCoPipeline

    loaded = DiCoPipeline.from_pretrained(flow_model)
    loaded.set_progress_bar_config(disable=True)
    picture(50, 40).save(tmp_path / "image.png")
    made = np.asarray(loaded(class_labels=3, seed=7, width=64, image=picture(50, 40), strength=0.5).images[0])
    words = ["--labels", "3", "--width", "64", "--init-image", str(tmp_path / "image.png"), "--strength", "0.5"]
    np.testing.assert_array_equal(made, sampled(flow_model, tmp_path / "ours", *words)[0])


def test_features_take_the_place_of_texts(pipeline, tmp_path):
    tokens, pooled = pipeline.encode_prompt(PROMPTS)
    blue, blue_pooled = pipeline.encode_prompt("blue")
    negative = {"negative_prompt_embeds": blue, "negative_pooled_prompt_embeds": blue_pooled}
    given = {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled, **negative}
    expected = latents(pipeline, PROMPTS, negative_prompt="blue", seed=1, num_images_per_prompt=2)
    assert torch.equal(latents(pipeline, None, seed=1, num_images_per_prompt=2, **given), expected)
    plain = latents(pipeline, None, seed=1, prompt_embeds=tokens, pooled_prompt_embeds=pooled)
    assert torch.equal(plain, latents(pipeline, PROMPTS, seed=1))
    with pytest.raises(ValueError, match="prompt_embeds: they take the place of prompt"):
        latents(pipeline, **given)
    with pytest.raises(ValueError, match="take the place of negative_prompt"):
        latents(pipeline, None, negative_prompt="blue", **given)
    with pytest.raises(ValueError, match=r"pooled_prompt_embeds: this model needs \(N, 16\), found none"):
        latents(pipeline, None, prompt_embeds=tokens)
    with pytest.raises(ValueError, match=r"prompt_embeds: this model needs \(N, 77, 16\), found \(2, 76, 16\)"):
        latents(pipeline, None, prompt_embeds=tokens[:, 1:], pooled_prompt_embeds=pooled)


def test_features_serve_a_pipeline_without_a_text_encoder(pipeline):
    from dico_t2i.export.portable.pipeline import DiCoPipeline

    settings = {
        key: pipeline.config[key] for key in ("diffusion", "sampler", "image_size", "downscale", "latent_scale")
    }
    bare = DiCoPipeline(pipeline.transformer, pipeline.scheduler, pipeline.vae, None, None, **settings)
    bare.set_progress_bar_config(disable=True)
    tokens, pooled = pipeline.encode_prompt(PROMPTS)
    given = {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled}
    with pytest.raises(ValueError, match="negative_prompt_embeds: guidance needs them"):
        latents(bare, None, **given)
    assert torch.equal(
        latents(bare, None, seed=1, guidance_scale=1.0, **given),
        latents(pipeline, PROMPTS, seed=1, guidance_scale=1.0),
    )


def test_arguments_of_images_that_do_not_fit_are_named(pipeline, monkeypatch):
    from diffusers import DDIMScheduler

    with pytest.raises(ValueError, match="strength: it needs an image"):
        pipeline(PROMPTS[0], strength=0.5)
    with pytest.raises(ValueError, match="must be more than 0 and at most 1"):
        pipeline(PROMPTS[0], image=picture(32, 32), strength=0)
    with pytest.raises(ValueError, match="black everywhere"):
        pipeline(PROMPTS[0], image=picture(32, 32), mask_image=Image.new("L", (32, 32)))
    monkeypatch.setattr(pipeline, "scheduler", DDIMScheduler())
    with pytest.raises(ValueError, match=r"image: it needs a sampler of this pipeline; .* iddpm"):
        pipeline(PROMPTS[0], image=picture(32, 32))
    assert latents(pipeline, image=picture(32, 32), sampler="ddim", strength=0.5, num_inference_steps=4).any()


def test_the_progress_bar_and_the_number_of_steps_are_those_of_the_strength(pipeline, capsys):
    pipeline.set_progress_bar_config(disable=False)
    try:
        latents(pipeline, sampler="ddim", num_inference_steps=8, image=picture(32, 32), strength=0.5)
    finally:
        pipeline.set_progress_bar_config(disable=True)
    assert pipeline._num_timesteps == 4
    assert "4/4" in capsys.readouterr().err


def test_channels_of_latents_may_have_a_mean_and_scale_of_their_own(pipeline):
    from dico_t2i.export.portable.pipeline import DiCoPipeline

    settings = {key: pipeline.config[key] for key in ("diffusion", "sampler", "image_size", "downscale")}
    each = {"mean": [0.0, 1.0, -2.0, 0.5], "scale": [0.5, 1.0, 2.0, 4.0]}
    parts = pipeline.transformer, pipeline.scheduler, pipeline.vae, None, None
    other, device = DiCoPipeline(*parts, **settings, latent_channels=each), torch.device("cpu")
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain, scaled = pipeline._mean_latents(device, images), other._mean_latents(device, images)
    mean, scale = (torch.tensor(each[key])[:, None, None] for key in ("mean", "scale"))
    torch.testing.assert_close(scaled, (plain / pipeline.config["latent_scale"] - mean) * scale)
    assert (other._decode(scaled).int() - pipeline._decode(plain).int()).abs().max() <= 1
