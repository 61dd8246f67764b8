"""T5's encoders as text towers, from transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dico_t2i.config import TextTowerConfig
from dico_t2i.encoders.local import config_hash, load_transformers, read_json, resolve
from dico_t2i.encoders.text.clip import clip_backend, known_settings
from dico_t2i.encoders.text.clip_tower import END, VOCABULARY
from dico_t2i.encoders.text.features import FeatureSize, TextFeatures, TowerSize
from dico_t2i.encoders.text.tokenizers import FastTokenizer
from dico_t2i.encoders.text.tower import Tower

_INDEX = "model.safetensors.index.json"
_T5_SIZES = {"base": (768, 12, 2048, 12), "large": (1024, 16, 2816, 24), "xl": (2048, 32, 5120, 24)}
# The content of config.json for these hub ids, for machines that do not have the files.
KNOWN: dict[str, dict[str, Any]] = {
    f"google/flan-t5-{name}": {
        "d_model": width,
        "num_heads": heads,
        "d_kv": 64,
        "d_ff": inner,
        "num_layers": layers,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    }
    for name, (width, heads, inner, layers) in _T5_SIZES.items()
}


class T5Tokenizer(FastTokenizer):
    """T5's tokenizer, which has no start token and its own padding token."""

    name = "tokenizers T5"


def files(config: TextTowerConfig) -> list[Path]:
    """Settings, tokenizer, and the weights in one file, or as an index and its parts."""
    return weight_files(config.model, ("model.safetensors",))


def weight_files(model: str, single: Sequence[str]) -> list[Path]:
    """The settings and tokenizer of a model, and its weights: one file of these names, or an index and its parts."""
    key = "text_encoder.model"
    settings, tokenizer, weights = resolve(model, (("config.json",), ("tokenizer.json",), (*single, _INDEX)), key)
    if weights.name != _INDEX:
        return [settings, tokenizer, weights]
    names = sorted(set(read_json(weights).get("weight_map", {}).values()))
    return resolve(model, [(file.name,) for file in (settings, tokenizer, weights)] + [(n,) for n in names], key)


def source(config: TextTowerConfig) -> str:
    """The folder or hub id that the tower comes from."""
    return config.model


def load(config: TextTowerConfig) -> Tower:
    """Load the tower of a folder or hub id. Raises ValueError if it is not a T5."""
    settings_file, vocabulary, *weights = files(config)
    settings = read_json(settings_file)
    if settings.get("model_type") != "t5":
        raise ValueError(f"text_encoder.model: {settings_file} describes {settings.get('model_type')!r}, not T5")
    from tokenizers import Tokenizer as Backend
    from transformers import T5EncoderModel

    backend, pad = Backend.from_file(str(vocabulary)), settings.get("pad_token_id", 0)
    padding = backend.id_to_token(pad)
    if backend.get_vocab_size() > settings["vocab_size"] or padding is None:
        raise ValueError(f"{vocabulary}: its {backend.get_vocab_size()} tokens do not fit {settings_file}")
    module = load_transformers(T5EncoderModel, settings_file.parent, weights[0])
    return Tower(
        module,
        T5Tokenizer(backend, config.tokens, pad, padding),
        features,
        f"pretrained text tower {config.model} (T5, {config.tokens} tokens)",
        sources(config, settings, vocabulary, weights),
        config.kind,
    )


def sources(config: TextTowerConfig, settings: Any, vocabulary: Path, weights: Sequence[Path]) -> dict[str, str | Path]:
    """The parts of a tower's identity; ``weights`` is one file, or an index and its parts, which alone count."""
    parts = [path for path in weights if path.name != _INDEX]
    return {
        "model": Path(config.model).name,
        "vocabulary": vocabulary,
        **{"weights" + (f".{n}" if n else ""): path for n, path in enumerate(parts)},
        "config": config_hash(settings),
    }


def features(tower: Tower, ids: Tensor) -> TextFeatures:
    """Features of token ids (N, T), zero at the padding; T5 has no pooled feature."""
    known = ids != tower.tokenize.pad_id
    tokens = tower.module(input_ids=ids, attention_mask=known).last_hidden_state * known[..., None]
    return TextFeatures(tokens, tokens.new_empty(len(tokens), 0))


def settings_of(config: TextTowerConfig) -> Any:
    """The tower's config.json, or its known content for the hub id. Raises MissingModelError if there is neither."""
    return known_settings(config.model, KNOWN)


def size(config: TextTowerConfig, settings: Any) -> TowerSize:
    """The tower's sizes; ``settings`` is its config.json."""
    inner = settings["d_ff"] * (3 if "gated" in settings.get("feed_forward_proj", "relu") else 2)
    attention = settings["num_heads"] * settings["d_kv"]
    return _t5_size(
        config.tokens, settings["d_model"], attention, inner, settings["num_layers"], settings["vocab_size"]
    )


def seeded_size(config: TextTowerConfig) -> TowerSize:
    """The sizes of a seeded tower."""
    tower = config.seeded
    attention = tower.heads * (tower.width // tower.heads)
    return _t5_size(config.tokens, tower.width, attention, 2 * 4 * tower.width, tower.layers, VOCABULARY + 1)


def _t5_size(tokens: int, width: int, attention: int, inner: int, layers: int, vocabulary: int) -> TowerSize:
    """The sizes of a T5 tower; inner is the hidden width, summed over the matrices of a feed-forward."""
    weights = layers * (4 * width * attention + width * inner)
    return TowerSize(FeatureSize(tokens, width, 0), weights, vocabulary * width)


def seeded(config: TextTowerConfig) -> tuple[nn.Module, T5Tokenizer]:
    """A tower with CLIP's vocabulary and one more token for padding; its weights are set afterwards."""
    size, tokens = config.seeded, config.tokens
    from tokenizers.processors import TemplateProcessing
    from transformers import T5Config, T5EncoderModel

    settings = T5Config(
        vocab_size=VOCABULARY + 1,
        d_model=size.width,
        d_kv=size.width // size.heads,
        d_ff=4 * size.width,
        num_layers=size.layers,
        num_heads=size.heads,
        pad_token_id=VOCABULARY,
        eos_token_id=END,
    )
    backend = clip_backend()
    backend.post_processor = TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", END)])
    return T5EncoderModel(settings), T5Tokenizer(backend, tokens, VOCABULARY, "<pad>")
