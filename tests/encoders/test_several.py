"""T5 saved on the spot, several encoders as one, and what a network must be told of them."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from dico_t2i.commands.prefetch import prefetch
from dico_t2i.config import ConfigError, DiCoConfig, TextEncoderConfig, dump_config, load_config, parse_config
from dico_t2i.data.sources import same_encoder
from dico_t2i.encoders import MissingModelError, TextEncoder, find_text_encoder, load_text_encoder
from dico_t2i.encoders.conditioner import Conditioner, check_text
from dico_t2i.encoders.text import text_sizes
from dico_t2i.models import count_parameters
from tests.encoders.test_text import PROJECTED, held_out_accuracy, save_clip

CAPTIONS = ["a red dog", "two dogs on a very large beach", ""]
CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "text").glob("*.yaml"))
WIDTH = 24


def save_t5(folder: Path, **options: Any) -> Any:
    """A whole T5, decoder and all, as transformers saves it, with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5Config, T5ForConditionalGeneration

    words = ["<pad>", "</s>", "<unk>", "a", "red", "dog", "dogs", "two", "on", "very", "large", "beach"]
    sizes = {"d_model": WIDTH, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 16}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu")).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder, **options)
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    return model


def t5(folder: Path, tokens: int = 9) -> TextEncoder:
    return load_text_encoder(TextEncoderConfig(kind="t5", model=str(folder), tokens=tokens), "cpu")


def several(*towers: dict[str, Any]) -> TextEncoderConfig:
    return TextEncoderConfig.model_validate({**towers[0], "also": towers[1:]})


SEEDED = {"weights": "seeded", "seeded": {"width": 16, "layers": 1, "heads": 2}}
SEEDED_T5 = {"kind": "t5", "tokens": 12, "weights": "seeded", "seeded": {"width": 24, "layers": 1, "heads": 2}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("models") / "t5"
    return folder, save_t5(folder)


def test_t5_says_what_transformers_says_and_zeros_for_padding(saved: tuple[Path, Any]) -> None:
    folder, model = saved
    encoder = t5(folder)
    ids = encoder.tokenize(CAPTIONS)
    assert ids.tolist()[0] == [3, 4, 5, 1, 0, 0, 0, 0, 0]
    assert pickle.loads(pickle.dumps(encoder.tokenize))(CAPTIONS).equal(ids)
    features = encoder.encode(ids)
    for row, (caption, length) in enumerate(zip(CAPTIONS, (4, 8, 1), strict=True)):
        with torch.no_grad():
            expected = model.encoder(input_ids=ids[row : row + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(features.tokens[row, :length], expected, rtol=1e-4, atol=1e-5, msg=caption)
    assert not features.tokens[0, 4:].any()
    assert features.tokens[0, :4].ne(0).any(-1).all()
    assert (encoder.width, encoder.pooled_dim, features.pooled.shape) == (WIDTH, 0, (3, 0))
    longer = t5(folder, 20).encode(t5(folder, 20).tokenize(CAPTIONS)).tokens
    torch.testing.assert_close(longer[:, :9], features.tokens, rtol=1e-4, atol=1e-5)
    assert t5(folder, 5).tokenize(CAPTIONS)[1].tolist() == [7, 6, 8, 3, 1]


def test_t5_in_parts_is_the_same_and_its_identity_knows_all_files(saved: tuple[Path, Any], tmp_path: Path) -> None:
    save_t5(tmp_path / "parts", max_shard_size="10KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    whole, parts = t5(saved[0]), t5(tmp_path / "parts")
    ids = whole.tokenize(CAPTIONS)
    assert torch.equal(whole.encode(ids).tokens, parts.encode(ids).tokens)
    identity = parts.identity()
    assert identity["tokens"] == "9"
    assert {"weights", "weights.1", "vocabulary", "config"} <= identity.keys()
    assert not same_encoder(identity, t5(tmp_path / "parts", 8).identity())
    last = sorted((tmp_path / "parts").glob("model-*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(MissingModelError, match=last.name):
        find_text_encoder(TextEncoderConfig(kind="t5", model=str(tmp_path / "parts")))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("tokenizer.json", None, r"text_encoder\.model: no usable copy.*lacks tokenizer\.json"),
        ("model.safetensors", None, r"lacks model\.safetensors or model\.safetensors\.index\.json"),
        ("model.safetensors", b"torn", r"model\.safetensors: cannot be loaded"),
        ("config.json", {"model_type": "bert"}, "'bert', not T5"),
        ("config.json", {"vocab_size": 5}, "its 12 tokens do not fit"),
    ],
)
def test_what_is_not_a_t5_is_refused(tmp_path: Path, file: str, change: Any, message: str) -> None:
    save_t5(tmp_path)
    if change is None:
        (tmp_path / file).unlink()
    elif isinstance(change, bytes):
        (tmp_path / file).write_bytes(change)
    else:
        (tmp_path / file).write_text(json.dumps({**json.loads((tmp_path / file).read_text()), **change}))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        t5(tmp_path)


def test_several_lie_side_by_side(saved: tuple[Path, Any], tmp_path: Path) -> None:
    clip, _ = save_clip(tmp_path / "clip")
    parts: list[dict[str, Any]] = [
        {"model": str(clip)},
        {"kind": "t5", "model": str(saved[0]), "tokens": 9},
        {**SEEDED, "kind": "open_clip"},
    ]
    joint = load_text_encoder(several(*parts), "cpu")
    alone = [load_text_encoder(TextEncoderConfig.model_validate(part), "cpu") for part in parts]
    assert joint.tokenize(CAPTIONS).shape == (3, 77 + 9 + 77)
    features = joint.encode(pickle.loads(pickle.dumps(joint.tokenize))(CAPTIONS))
    own = [encoder.encode(encoder.tokenize(CAPTIONS)) for encoder in alone]
    for got, one in zip(features.tokens.split((77, 9, 77), dim=1), own, strict=True):
        assert torch.equal(got[..., : one.tokens.shape[-1]], one.tokens)
        assert not got[..., one.tokens.shape[-1] :].any()
    assert torch.equal(features.pooled, torch.cat((own[0].pooled, own[2].pooled), 1))
    assert (joint.width, joint.pooled_dim, joint.seeded) == (24, PROJECTED + 16, True)
    assert " + " in joint.description
    for size, encoder in zip(text_sizes(several(*parts)), alone, strict=True):
        assert size.features == encoder.sizes[0] == (encoder.tokenize.tokens, encoder.width, encoder.pooled_dim)
    moved = {**joint.identity(), "model": "elsewhere", "also.0.model": "elsewhere"}
    assert same_encoder(joint.identity(), moved)
    assert not same_encoder(joint.identity(), {**moved, "also.0.weights": "other"})
    assert joint.identity().items() >= alone[0].identity().items()
    with pytest.raises(ValueError, match="only a single CLIP"):
        joint.save(tmp_path / "tower", tmp_path / "tokenizer")


def test_the_size_of_t5_is_that_of_its_weights(saved: tuple[Path, Any]) -> None:
    (size,) = text_sizes(TextEncoderConfig(kind="t5", model=str(saved[0]), tokens=9))
    stack = saved[1].encoder
    matrices = sum(p.numel() for n, p in stack.block.named_parameters() if p.ndim == 2 and "bias" not in n)
    assert (size.layers, size.table) == (matrices, stack.embed_tokens.weight.numel())


def test_a_missing_one_is_named_by_its_place(tmp_path: Path) -> None:
    config = several(SEEDED, SEEDED, {"kind": "t5", "model": "/no/such/t5"})
    for find in (find_text_encoder, text_sizes, lambda c: load_text_encoder(c, "cpu")):
        with pytest.raises(MissingModelError, match=r"text_encoder\.also\.1\.model: no usable copy of '/no/such/t5'"):
            find(config)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"text_encoder\.also\.0\.model: the config of .* has no 'd_ff'"):
        text_sizes(several(SEEDED, {"kind": "t5", "model": str(tmp_path)}))
    with pytest.raises(ValueError, match=r"text_encoder\.also\.0\.seeded: width 16 is not divisible by heads 3"):
        load_text_encoder(several(SEEDED, {**SEEDED, "seeded": {"width": 16, "heads": 3}}), "cpu")
    with pytest.raises(ValueError, match="tokens: 80, but CLIP always has 77"):
        several(SEEDED, {**SEEDED, "tokens": 80})


def test_seeded_t5_carries_the_words() -> None:
    config = TextEncoderConfig.model_validate({**SEEDED_T5, "tokens": 20, "seeded": {"width": 128}})
    encoder = load_text_encoder(config, "cpu")
    colours, shapes = ("red", "green", "blue", "yellow"), ("circle", "square", "star", "ring", "cross")
    every = torch.tensor([(i, j, k) for i in range(4) for j in range(5) for k in range(8)])
    order = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    captions = [f"{'very ' * k}large {shapes[j]} that is {colours[i]}" for i, j, k in order.tolist()]
    tokens = encoder.encode(encoder.tokenize(captions)).tokens
    means = tokens.sum(1) / tokens.ne(0).any(-1).sum(1, keepdim=True)
    assert min(held_out_accuracy(means, order[:, n]) for n in (0, 1)) >= 0.95
    assert load_text_encoder(config, "cpu").identity() == encoder.identity()


def network(**options: Any) -> DiCoConfig:
    sizes = {"hidden_size": 8, "depths": (1, 1, 1, 1, 1), "mlp_ratio": 2.0, "condition": "text"}
    return DiCoConfig.model_validate({**sizes, "text_dim": 24, "text_tokens": 89, "text_kernel": 11, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_dim": 16}, "model.text_dim: 16, but the text encoder gives 24"),
        ({"text_tokens": 77}, "model.text_tokens: 77, but the text encoder gives 89; set model.text_tokens=89"),
        ({"pooled_text": True}, "model.pooled_dim: 768, but the text encoder gives 16"),
        (
            {"text_inputs": ((12, 24), (77, 16))},
            r"model.text_inputs: \[\[12, 24\], \[77, 16\]\], but the text encoders",
        ),
    ],
)
def test_a_network_for_other_encoders_is_refused(options: dict[str, Any], message: str) -> None:
    sizes = [size.features for size in text_sizes(several(SEEDED, SEEDED_T5))]
    check_text(network(text_inputs=((77, 16), (12, 24))), sizes)
    with pytest.raises(ConfigError, match=message):
        check_text(network(**options), sizes)


def test_t5_alone_has_no_pooled_feature() -> None:
    encoder = load_text_encoder(TextEncoderConfig.model_validate(SEEDED_T5), "cpu")
    cond = Conditioner(network(text_tokens=12), encoder, torch.device("cpu")).of_prompts(CAPTIONS)["cond"]
    assert isinstance(cond, Tensor)
    assert cond.shape == (3, 12, 24)
    with pytest.raises(ConfigError, match="T5 has no pooled feature"):
        Conditioner(network(text_tokens=12, pooled_text=True), encoder, torch.device("cpu"))


def test_prefetch_gets_all_of_them(saved: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, _ = save_clip(tmp_path / "clip")
    tree = yaml.safe_load(dump_config(load_config(CONFIGS[0])))
    encoder = {"model": str(clip), "also": [{"kind": "t5", "model": str(saved[0])}, SEEDED]}
    config = parse_config({**tree, "autoencoder": {"kind": "pixels"}, "text_encoder": encoder} | _pixels(tree), "test")
    prefetch(config, tmp_path / "out", report=lambda line: None)
    assert {path.name for path in (tmp_path / "out" / saved[0].name).iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert (tmp_path / "out" / "clip" / "model.safetensors").is_file()


def _pixels(tree: dict[str, Any]) -> dict[str, Any]:
    return {"model": {**tree["model"], "in_channels": 3}}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_fit_their_encoders(path: Path) -> None:
    config = load_config(path)
    check_text(config.model, [size.features for size in text_sizes(config.text_encoder)])
    assert parse_config(yaml.safe_load(dump_config(config)), path.name) == config
    assert count_parameters(config.model) > 130e6
