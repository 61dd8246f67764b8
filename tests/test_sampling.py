"""From prompts to images: what is computed once, and that it changes nothing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dico_t2i import cli
from dico_t2i.cli import _parser
from dico_t2i.commands.sample import chosen_sampler
from dico_t2i.config import SamplerConfig, parse_config
from dico_t2i.diffusion import guided, sample
from dico_t2i.encoders.load import load_encoders
from dico_t2i.encoders.text import TextEncoder
from dico_t2i.models import DiCo, DiCoConfig
from dico_t2i.randomness import normal
from dico_t2i.sampling.given import fit_image, fit_mask, latent_mask
from dico_t2i.sampling.options import Options, image_size
from dico_t2i.sampling.pipeline import Pipeline, as_cuda_graph
from tests.small_models import save_autoencoder

MODEL = {"hidden_size": 8, "depths": [2, 1, 1, 0, 2], "mlp_ratio": 2, "in_channels": 3, "condition": "text"}
TREE = {
    "name": "small",
    "model": {**MODEL, "text_dim": 32, "pooled_text": True, "pooled_dim": 32},
    "autoencoder": {"kind": "pixels"},
    "text_encoder": {"kind": "transformers", "weights": "seeded", "seeded": {"width": 32, "layers": 1, "heads": 2}},
    "data": {"path": "nowhere", "image_size": 8, "streams": 4},
    "train": {"duration": {"steps": 1}, "global_batch": 4},
}
FUSIONS = [{}, {"text_projection": "stage"}, {"text_fusion": "cross_attention"}]
PROMPTS = ["a red circle", "a blue cross", "a red circle", "a green square"]
SAMPLER = SamplerConfig(kind="iddpm", steps=3, guidance=2.0)


def pipeline(**options) -> Pipeline:
    torch.manual_seed(0)
    config = parse_config({**TREE, "model": {**TREE["model"], **options}}, "test")
    model = DiCo(config.model).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return Pipeline(config, model, *load_encoders(config, torch.device("cpu"), torch.float32), torch.device("cpu"))


@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
def test_kernels_made_once_give_the_same_bits(fusion):
    model = pipeline(**fusion).model
    x, small = torch.randn(3, 3, 20, 20), torch.randn(3, 3, 8, 8)
    t, tokens, pooled = torch.tensor([0, 3, 999]), torch.randn(3, 77, 32), torch.randn(3, 32)
    kernels = model.text_kernels(tokens)
    assert torch.equal(model(x, t, kernels, pooled), model(x, t, tokens, pooled))
    assert not torch.equal(model(x, t, model.text_kernels(tokens + 1), pooled), model(x, t, tokens, pooled))
    # Where some taps meet padding alone, the network makes none of them, and rounds differently.
    torch.testing.assert_close(model(small, t, kernels, pooled), model(small, t, tokens, pooled))


def test_a_model_of_classes_has_no_kernels():
    with pytest.raises(ValueError, match="classes"):
        DiCo(DiCoConfig(**{**MODEL, "condition": "class"})).text_kernels(torch.zeros(1, 77, 768))


@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
def test_a_whole_sampling_is_the_one_that_makes_kernels_at_each_step(fusion):
    pipe = pipeline(**fusion)
    cond, null = pipe.conditioner.of_prompts(PROMPTS), pipe.conditioner.null(len(PROMPTS))
    prepared, prepared_null = pipe._conditioning(PROMPTS), pipe._prepared(pipe.conditioner.null(1))
    noise = torch.randn(len(PROMPTS), 3, 20, 20)  # where every tap meets a pixel
    plain, cached = (
        sample(pipe.config.diffusion, SAMPLER, guided(pipe.model, c, u, 2.0), noise, lambda k: noise, True)
        for c, u in ((cond, null), (prepared, prepared_null))
    )
    assert torch.equal(plain, cached)


def test_an_image_depends_on_its_prompt_and_seed_alone(monkeypatch):
    pipe, encoded = pipeline(), []
    tokenize = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, ids: encoded.append(len(ids)) or tokenize(self, ids))
    images = pipe.generate(PROMPTS, [5, 6, 7, 5], SAMPLER)
    assert encoded == [3]  # the two that are equal once; the empty one was encoded when the encoder was loaded
    alone = pipe.generate(PROMPTS[2:3], [7], SAMPLER, batch=1)
    by_twos = pipe.generate(PROMPTS, [5, 6, 7, 5], SAMPLER, batch=2, decode_batch=1)
    assert (images[2].int() - alone[0].int()).abs().max() <= 1  # sums of other lengths round otherwise
    assert (images.int() - by_twos.int()).abs().max() <= 1
    assert not torch.equal(images[0], images[2])


def test_without_a_gpu_the_network_is_called_itself():
    network = lambda x, t: x  # noqa: E731
    assert as_cuda_graph(network, torch.zeros(1, 3, 8, 8)) is network


def test_fast_is_a_default_that_what_is_named_goes_over():
    def asked(*words: str) -> SamplerConfig:
        parsed = _parser().parse_args(["sample", "--checkpoint", "x", "--prompt", "y", "--out", "z", *words])
        return chosen_sampler(parsed, SamplerConfig(guidance=3.0))

    assert asked() == SamplerConfig(guidance=3.0)
    assert asked("--fast") == SamplerConfig(kind="dpm++", steps=20, guidance=3.0)
    assert asked("--fast", "--steps", "8").steps == 8


SAMPLERS = [SamplerConfig(kind=kind, steps=5, guidance=2.0) for kind in ("iddpm", "ddim", "dpm++")]
FLOW_SAMPLERS = [SamplerConfig(kind=kind, steps=5, guidance=2.0) for kind in ("euler", "heun", "dpm++", "euler_sde")]


def picture(height: int, width: int) -> Image.Image:
    """Noise, of which every pixel is different."""
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
def test_a_negative_prompt_is_guidance_with_that_text_as_the_unconditional_branch(fusion):
    pipe = pipeline(**fusion)
    cond, null = (pipe.conditioner.of_prompts([text]) for text in ("a red circle", "a blue cross"))
    index = torch.tensor([7])
    noise = normal(0, "initial noise", index, (3, 8, 8))
    latents = sample(
        pipe.config.diffusion,
        SAMPLER,
        guided(pipe.model, cond, null, 2.0),
        noise,
        lambda k: normal(0, f"step noise {k}", index, (3, 8, 8)),
        True,
    )
    made = pipe.generate(["a red circle"], [7], SAMPLER, options=Options(negative_prompt="a blue cross"))
    assert torch.equal(made, pipe.autoencoder.decode(latents))
    plain = pipe.generate(["a red circle"], [7], SAMPLER)
    assert not torch.equal(made, plain)
    assert torch.equal(plain, pipe.generate(["a red circle"], [7], SAMPLER, options=Options(negative_prompt="")))


@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
def test_other_sizes_use_the_whole_height_and_width(fusion):
    """With the kernels of the paper, too: the size is that of the noise, and what is sampled is what it says."""
    pipe = pipeline(**fusion)
    made = pipe.generate(PROMPTS, [5, 6, 7, 5], SAMPLER, options=Options(height=12, width=20))
    assert made.shape == (4, 3, 12, 20)
    assert made.float().std((2, 3)).min() > 1
    assert image_size(pipe.config, Options(width=12)) == (8, 12)
    by_two = pipe.generate(PROMPTS, [5, 6, 7, 5], SAMPLER, 2, options=Options(height=12, width=20))
    assert (made.int() - by_two.int()).abs().max() <= 1
    with pytest.raises(ValueError, match="10x8 pixels must be divisible by 4"):
        pipe.generate(PROMPTS, [5, 6, 7, 5], SAMPLER, options=Options(height=10))


@pytest.mark.parametrize("sampler", SAMPLERS + FLOW_SAMPLERS, ids=lambda sampler: sampler.kind)
def test_an_image_is_changed_within_its_mask_alone(sampler):
    pipe = pipeline() if sampler in SAMPLERS else flow_pipeline()
    image, mask = picture(8, 8), Image.new("L", (8, 8))
    mask.paste(255, (2, 3, 5, 8))
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[3:8, 2:5] = True
    given = Options(image=image, mask=mask)
    made = pipe.generate(PROMPTS[:2], [5, 6], sampler, options=given)
    assert torch.equal(made[:, :, ~inside], pixels(image)[:, ~inside].expand(2, -1, -1))
    assert (made[:, :, inside] != pixels(image)[:, inside]).float().mean() > 0.5
    whole = pipe.generate(PROMPTS[:2], [5, 6], sampler, options=Options(image=image, strength=1.0))
    assert torch.equal(whole, pipe.generate(PROMPTS[:2], [5, 6], sampler))
    near = pipe.generate(PROMPTS[:2], [5, 6], sampler, options=Options(image=image, strength=0.45))
    assert distance(near, image) < distance(whole, image)


def distance(images: torch.Tensor, image: Image.Image) -> float:
    return (images.float() - pixels(image).float()).square().mean().item()


def flow_pipeline() -> Pipeline:
    torch.manual_seed(0)
    tree = {**TREE, "diffusion": {"kind": "flow"}, "sampler": {"kind": "euler"}}
    config = parse_config({**tree, "model": {**TREE["model"], "learn_sigma": False}}, "test")
    model = DiCo(config.model).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return Pipeline(config, model, *load_encoders(config, torch.device("cpu"), torch.float32), torch.device("cpu"))


def test_latents_are_those_of_the_autoencoder_and_a_latent_is_made_anew_if_a_pixel_is(tmp_path):
    """With an autoencoder of 8 pixels a latent; the pixels outside of the mask are still the image's own."""
    tree = {**TREE, "autoencoder": {"path": str(save_autoencoder(tmp_path / "vae"))}}
    config = parse_config(
        {**tree, "data": {**TREE["data"], "image_size": 32}, "model": {**TREE["model"], "in_channels": 4}}, "test"
    )
    model = DiCo(config.model).eval().requires_grad_(False)
    pipe = Pipeline(config, model, *load_encoders(config, torch.device("cpu"), torch.float32), torch.device("cpu"))
    image, mask = picture(64, 32), Image.new("L", (32, 64))
    mask.putpixel((9, 17), 255)
    seen = []
    clean = pipe.autoencoder.mean_latents(pixels(image)[None])
    decode = pipe.autoencoder.decode
    pipe.autoencoder.decode = lambda latents: seen.append(latents) or decode(latents)
    made = pipe.generate(["a"], [1], SAMPLER, options=Options(height=64, image=image, mask=mask))
    assert made.shape == (1, 3, 64, 32)
    changed = (seen[0] != clean).any(1)[0]
    assert changed.nonzero().tolist() == [[2, 1]]
    different = (made[0] != pixels(image)).any(0)
    assert different.nonzero().tolist() == [[17, 9]]


def test_images_and_masks_are_cropped_and_resized_alike():
    image = picture(20, 40)
    assert torch.equal(fit_image(image, 20, 40), pixels(image))
    assert fit_image(image, 8, 8).shape == (3, 8, 8)
    mask = Image.new("L", (40, 20))
    mask.paste(255, (0, 0, 15, 20))  # left of the middle square from column 10 on
    assert fit_mask(mask, 20, 20).nonzero()[:, 1].unique().tolist() == [0, 1, 2, 3, 4]
    assert fit_mask(mask, 20, 20).shape == (20, 20)
    turned = image.copy()
    turned.getexif()[0x0112] = 6  # to be turned by 90 degrees
    assert fit_image(turned, 40, 20).shape == (3, 40, 20)
    assert torch.equal(fit_image(turned, 40, 20), pixels(image.transpose(Image.Transpose.ROTATE_270)))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (fit_image(clear, 8, 8) == 255).all()
    with pytest.raises(ValueError, match="more than 8 bits"):
        fit_image(Image.new("I;16", (8, 8)), 8, 8)
    with pytest.raises(ValueError, match="black everywhere"):
        fit_mask(Image.new("L", (8, 8)), 8, 8)
    masks = torch.zeros(1, 16, 16, dtype=torch.bool)
    masks[0, 7, 8] = True
    assert latent_mask(masks, 8).nonzero().tolist() == [[0, 0, 0, 1]]


def test_options_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="strength: it needs an image"):
        Options(strength=0.5)
    with pytest.raises(ValueError, match="mask: it needs an image"):
        Options(mask=Image.new("L", (8, 8), 255), strength=0.5)
    for strength in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="must be more than 0 and at most 1"):
            Options(image=picture(8, 8), strength=strength)
    pipe = pipeline()
    with pytest.raises(ValueError, match="negative_prompt: it has no effect with guidance 1"):
        pipe.check(Options(negative_prompt="a"), SamplerConfig(guidance=1.0))
    pipe.config = parse_config({**TREE, "model": {**MODEL, "condition": "class"}}, "test")
    with pytest.raises(ValueError, match="negative_prompt: this model takes classes"):
        pipe.check(Options(negative_prompt="a"), SAMPLER)


def test_a_call_makes_images_of_pillow_with_the_options_of_the_command():
    pipe = pipeline()
    images = pipe(PROMPTS[:2], seed=5, per_prompt=2, steps=3, sampler="iddpm", guidance=2.0)
    conditions = [prompt for prompt in PROMPTS[:2] for _ in range(2)]
    expected = pipe.generate(conditions, [5, 6, 7, 8], SAMPLER)
    assert all(torch.equal(pixels(image), made) for image, made in zip(images, expected, strict=True))
    (one,) = pipe(PROMPTS[0], steps=3, height=12, width=8)
    assert one.size == (8, 12)
    with pytest.raises(ValueError, match="3 is not a prompt"):
        pipe(3)
    with pytest.raises(ValueError, match=r"options:\n  guidance: .*greater than or equal to 0"):
        pipe(PROMPTS[0], guidance=-1)
    with pytest.raises(TypeError, match="hight"):
        pipe(PROMPTS[0], hight=12)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """`dico sample` of a pipeline that is already loaded. Returns its exit code."""
    pipe = pipeline()
    monkeypatch.setattr("dico_t2i.commands.sample.load_pipeline", lambda *_: pipe)
    monkeypatch.setattr("dico_t2i.commands.sample._weights_identity", lambda path: {"checkpoint": "x"})
    base = ["sample", "--checkpoint", "x", "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--batch", "1"]

    def run(*words: str) -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main([*base, "--steps", "3", "--sampler", "iddpm", "--guidance", "2", *words])
        return int(ended.value.code or 0)

    run.pipe = pipe
    return run


def test_the_command_takes_the_options_and_goes_on_with_what_is_missing(command, tmp_path, capsys):
    picture(16, 8).save(tmp_path / "image.png")
    mask = Image.new("L", (8, 16))
    mask.paste(255, (0, 0, 8, 8))
    mask.save(tmp_path / "mask.png")
    out = tmp_path / "out"
    words = ["--negative-prompt", "a blue cross", "--height", "16", "--init-image", str(tmp_path / "image.png")]
    words += ["--mask", str(tmp_path / "mask.png"), "--strength", "0.9", "--out", str(out)]
    assert command(*words) == 0
    options = Options("a blue cross", 16, None, picture(16, 8), 0.9, mask)
    for number in (0, 1):
        made = command.pipe.generate(PROMPTS[number : number + 1], [number], SAMPLER, 1, options=options)[0]
        with Image.open(out / f"{number:05d}.png") as written:
            assert torch.equal(pixels(written), made)
    record = json.loads((out / "sample.json").read_text())["options"]
    assert record["negative_prompt"] == "a blue cross"
    assert record["height"] == 16
    assert len(record["mask"]) == 16  # a hash
    content = (out / "00001.png").read_bytes()
    (out / "00001.png").unlink()
    assert command(*words) == 0
    assert "already has 1 of 2 images" in capsys.readouterr().err
    assert (out / "00001.png").read_bytes() == content
    mask.paste(255, (0, 0, 8, 9))
    mask.save(tmp_path / "mask.png")
    assert command(*words) == 2
    assert "different command (options differ" in capsys.readouterr().err


def test_an_error_before_the_first_image_leaves_the_folder_free(command, tmp_path, capsys):
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no image")
    picture(8, 8).save(tmp_path / "image.png")
    image, out = ("--init-image", str(tmp_path / "image.png")), ("--out", str(tmp_path / "out"))
    assert command(*image, "--mask", str(tmp_path / "black.png"), *out) == 2
    assert command("--init-image", str(tmp_path / "text.png"), *out) == 2
    assert command("--strength", "0.5", *out) == 2
    assert command(*image, "--strength", "0.0001", *out) == 2
    said = capsys.readouterr().err
    for problem in ("black everywhere", "text.png: cannot be read", "strength: it needs", "0.0001 leaves none"):
        assert problem in said
    assert command(*image, *out) == 0


def test_images_are_written_as_each_batch_is_made(command, tmp_path, monkeypatch):
    make, made = Pipeline.generate, []

    def interrupted(self, *arguments, **options):
        if made:
            raise KeyboardInterrupt
        made.append(1)
        return make(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "generate", interrupted)
        assert command("--out", str(tmp_path / "out")) == 130
    first = (tmp_path / "out" / "00000.png").read_bytes()
    assert command("--out", str(tmp_path / "out")) == 0
    assert (tmp_path / "out" / "00000.png").read_bytes() == first
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00000.png",
        "00001.png",
        "grid.png",
        "sample.json",
    ]
