"""Sizes of text towers from their configs alone: a network is held against them before any weights are read."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dico_t2i.config import TextEncoderConfig, TextTowerConfig
from dico_t2i.encoders.local import MissingModelError, read_json, resolve
from dico_t2i.encoders.text import TOKENS, VOCABULARY, FeatureSize, find_tower, naming, open_clip_settings

# What the config.json of these hub ids says, for machines that do not have them.
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
_T5_SIZES = {"base": (768, 12, 2048, 12), "large": (1024, 16, 2816, 24), "xl": (2048, 32, 5120, 24)}
_KNOWN: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": {"text_config": _CLIP_L, "projection_dim": 768},
    **{
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
    },
}


class TowerSize(NamedTuple):
    """layers: weights that are multiplied with every token. table: weights of the embedding of tokens."""

    features: FeatureSize
    layers: int
    table: int


def text_sizes(config: TextEncoderConfig) -> list[TowerSize]:
    """Of all towers. Raises MissingModelError where a config is neither here nor known, ValueError if it is foreign."""
    sizes = []
    for number, tower in enumerate(config.towers):
        with naming(number):
            try:
                sizes.append(_size(tower))
            except KeyError as error:
                raise ValueError(
                    f"text_encoder.model: the config of {tower.model} has no {error}; is it {tower.kind}'s?"
                ) from None
    return sizes


def _size(config: TextTowerConfig) -> TowerSize:
    if config.weights == "seeded":
        size = config.seeded
        if config.kind != "t5":
            return _clip(size.width, 4 * size.width, size.layers, size.width)
        heads, each = size.heads, size.width // size.heads
        return _t5(config.tokens, size.width, heads * each, 2 * 4 * size.width, size.layers, VOCABULARY + 1)
    if config.kind == "open_clip":
        settings = _open_clip_settings(config)
        text = settings["text_cfg"]
        inner = int(text.get("mlp_ratio", 4) * text["width"])
        return _clip(text["width"], inner, text["layers"], settings["embed_dim"])
    settings = _settings(config.model)
    if config.kind == "t5":
        inner = settings["d_ff"] * (3 if "gated" in settings.get("feed_forward_proj", "relu") else 2)
        attention = settings["num_heads"] * settings["d_kv"]
        layers, vocabulary = settings["num_layers"], settings["vocab_size"]
        return _t5(config.tokens, settings["d_model"], attention, inner, layers, vocabulary)
    text = settings.get("text_config", settings)
    width = text.get("hidden_size", 512)
    projected = "CLIPTextModel" not in settings.get("architectures", ())
    pooled = settings.get("projection_dim", 512) if projected else width
    return _clip(width, text.get("intermediate_size", 2048), text.get("num_hidden_layers", 12), pooled)


def _open_clip_settings(config: TextTowerConfig) -> Mapping[str, Any]:
    try:
        return open_clip_settings(config.model, find_tower(config)[0])
    except MissingModelError:
        return open_clip_settings(config.model)


def _settings(model: str) -> Mapping[str, Any]:
    try:
        return read_json(resolve(model, [("config.json",)], "text_encoder.model")[0])
    except MissingModelError:
        if model not in _KNOWN:
            raise
        return _KNOWN[model]


def _clip(width: int, inner: int, layers: int, pooled: int) -> TowerSize:
    return TowerSize(
        FeatureSize(TOKENS, width, pooled), layers * (4 * width**2 + 2 * width * inner), VOCABULARY * width
    )


def _t5(tokens: int, width: int, attention: int, inner: int, layers: int, vocabulary: int) -> TowerSize:
    """inner: of all matrices of a feed-forward together."""
    weights = layers * (4 * width * attention + width * inner)
    return TowerSize(FeatureSize(tokens, width, 0), weights, vocabulary * width)
