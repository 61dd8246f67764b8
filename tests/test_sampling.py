"""From prompts to images: what is computed once, and that it changes nothing."""

import pytest
import torch

from dico_t2i.cli import _parser
from dico_t2i.commands.sample import chosen_sampler
from dico_t2i.config import SamplerConfig, parse_config
from dico_t2i.diffusion import guided, sample
from dico_t2i.encoders.load import load_encoders
from dico_t2i.encoders.text import TextEncoder
from dico_t2i.models import DiCo, DiCoConfig
from dico_t2i.sampling.pipeline import Pipeline, as_cuda_graph

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
    x, t, tokens, pooled = (
        torch.randn(3, 3, 8, 8),
        torch.tensor([0, 3, 999]),
        torch.randn(3, 77, 32),
        torch.randn(3, 32),
    )
    kernels = model.text_kernels(tokens)
    assert torch.equal(model(x, t, kernels, pooled), model(x, t, tokens, pooled))
    assert not torch.equal(model(x, t, model.text_kernels(tokens + 1), pooled), model(x, t, tokens, pooled))


def test_a_model_of_classes_has_no_kernels():
    with pytest.raises(ValueError, match="classes"):
        DiCo(DiCoConfig(**{**MODEL, "condition": "class"})).text_kernels(torch.zeros(1, 77, 768))


@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
def test_a_whole_sampling_is_the_one_that_makes_kernels_at_each_step(fusion):
    pipe = pipeline(**fusion)
    cond, null = pipe.conditioner.of_prompts(PROMPTS), pipe.conditioner.null(len(PROMPTS))
    prepared, prepared_null = pipe._conditioning(PROMPTS), pipe._prepared(pipe.conditioner.null(1))
    noise = torch.randn(len(PROMPTS), 3, 8, 8)
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
