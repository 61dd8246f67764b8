"""CLIP's text towers from open_clip."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from dico_t2i.config import TextTowerConfig
from dico_t2i.encoders.local import MissingModelError, config_hash, read_json, read_tensors, reading, resolve
from dico_t2i.encoders.text.clip import TOKENS, VOCABULARY, check_size, clip_size, open_clip_folder, seeded_size
from dico_t2i.encoders.text.features import TextFeatures, TowerSize
from dico_t2i.encoders.text.tower import Tower
from dico_t2i.remote import base_name, is_url

__all__ = ["features", "files", "load", "seeded", "seeded_size", "size", "source"]

_CARD = "open_clip_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
KNOWN: dict[str, dict[str, Any]] = {}  # open_clip itself contains the settings of all its models


class OpenClipTokenizer:
    """CLIP's tokenizer from open_clip; it pads with 0."""

    name = "open_clip SimpleTokenizer"
    pad_id = 0
    tokens = TOKENS

    def __init__(self) -> None:
        from open_clip import SimpleTokenizer

        self._backend = SimpleTokenizer()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return self._backend(list(captions), TOKENS)


def files(config: TextTowerConfig) -> list[Path]:
    """The weights and the config beside them. Raises MissingModelError if one cannot be found."""
    return _files(config, _tag(config.model, config.pretrained))


def source(config: TextTowerConfig) -> str:
    """The folder, URL, hub id or file that the tower comes from."""
    if Path(config.pretrained).is_file():
        return config.pretrained
    return _place(config, _tag(config.model, config.pretrained))[0]


def load(config: TextTowerConfig) -> Tower:
    """Load the tower of a tag, folder, hub id or file. Raises ValueError if it is not a CLIP."""
    tag = _tag(config.model, config.pretrained)
    weights = _files(config, tag)[0]
    settings = model_settings(config.model, weights)
    quick_gelu = bool(settings.get("quick_gelu") or tag.get("quick_gelu"))
    activation = "quick GELU" if quick_gelu else "GELU"
    module = _build(settings["embed_dim"], settings["text_cfg"], quick_gelu)
    with reading(weights):
        module.load_state_dict(_state(weights))
    return Tower(
        module,
        OpenClipTokenizer(),
        features,
        f"pretrained text tower {config.model} {config.pretrained} (open_clip, {activation})",
        {
            "model": f"{config.model} {base_name(config.pretrained)}",
            "weights": weights,
            "config": config_hash({**settings, "quick_gelu": quick_gelu}),
        },
        config.kind,
    )


def features(tower: Tower, ids: Tensor) -> TextFeatures:
    """Features of token ids (N, 77)."""
    pooled, tokens = tower.module(ids)
    return TextFeatures(tokens, pooled)


def size(config: TextTowerConfig, settings: Any) -> TowerSize:
    """The tower's sizes; ``settings`` is the result of ``model_settings``."""
    text = settings["text_cfg"]
    inner = int(text.get("mlp_ratio", 4) * text["width"])
    return clip_size(text["width"], inner, text["layers"], settings["embed_dim"])


def settings_of(config: TextTowerConfig) -> dict[str, Any]:
    """The architecture of a tower, which is known even without its weights."""
    try:
        return model_settings(config.model, files(config)[0])
    except MissingModelError:
        return model_settings(config.model)


def model_settings(model: str, weights: Path | None = None) -> dict[str, Any]:
    """The architecture: from the config beside the weights, else from open_clip by name."""
    beside = weights.with_name(_CARD) if weights else None
    packaged = open_clip_folder() / "model_configs" / f"{model}.json"
    if beside and beside.is_file():
        settings = read_json(beside)["model_cfg"]
    elif packaged.is_file():
        settings = read_json(packaged)
    else:
        raise ValueError(f"text_encoder.model: open_clip has no architecture {model!r}; use one such as ViT-L-14")
    text = settings["text_cfg"]
    if "hf_model_name" in text or text.get("embed_cls"):
        raise ValueError(f"text_encoder.model: the text tower of {model} is not CLIP's")
    check_size(text.get("context_length", TOKENS), text.get("vocab_size", VOCABULARY), "text_encoder.model", model)
    return settings


def seeded(config: TextTowerConfig) -> tuple[nn.Module, OpenClipTokenizer]:
    """A tower of the config's size and CLIP's tokenizer; its weights are set afterwards."""
    size = config.seeded
    settings = {"width": size.width, "heads": size.heads, "layers": size.layers}
    return _build(None, settings, quick_gelu=False), OpenClipTokenizer()


def _tag(model: str, pretrained: str) -> dict[str, Any]:
    """open_clip's entry for a tag of weights; empty if it is not a tag."""
    tables = _tables()
    tag = tables.get_pretrained_cfg(model, pretrained)
    if not tag and "/" not in pretrained and not Path(pretrained).exists():
        raise ValueError(
            f"text_encoder.pretrained: {pretrained!r} is not a file, folder, hub id, URL or tag of {model}"
            f" (its tags are {', '.join(tables.list_pretrained_tags_by_model(model)) or 'none'})"
        )
    return tag


def _files(config: TextTowerConfig, tag: dict[str, Any]) -> list[Path]:
    """The weights and the config beside them."""
    if Path(config.pretrained).is_file():
        return [Path(config.pretrained)]
    name, file = _place(config, tag)
    names = (file,) if file else ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    # A folder needs a config that says whether its weights use quick GELU. For a tag that is known, so a cache that
    # open_clip has filled with the weights alone is enough; and a file is used as the user describes it.
    card = (_CARD, *names) if tag or file else (_CARD,)
    return resolve(name, [names, card], "text_encoder.pretrained")


def _place(config: TextTowerConfig, tag: dict[str, Any]) -> tuple[str, str]:
    """The folder, URL or hub id, and the name of the file in it, which is empty for open_clip's usual names."""
    if is_url(config.pretrained) and config.pretrained.endswith(_WEIGHTS):
        folder, _, file = config.pretrained.rpartition("/")
        return folder, file
    name, _, file = (tag.get("hf_hub") or f"{config.pretrained}/").rpartition("/")
    return name, file


def _state(weights: Path) -> dict[str, Tensor]:
    """The weights of the text tower in a weight file, in any of open_clip's layouts."""
    state = read_tensors(weights)
    state = state.get("state_dict", state)  # of a checkpoint of training
    parts = {"token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection"}
    named = {name.removeprefix("module.").removeprefix("text."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in named.items() if name.split(".")[0] in parts}


def _build(embed_dim: int | None, settings: dict[str, Any], quick_gelu: bool) -> nn.Module:
    from open_clip.model import _build_text_tower

    return _build_text_tower(embed_dim, {**settings, "output_tokens": True}, quick_gelu)


def _tables() -> ModuleType:
    """open_clip's table of pretrained tags, loaded without importing all of open_clip, which takes seconds.

    A missing model is thus reported at once. The table is imported as part of a package with a different name but the
    same folder.
    """
    package = ModuleType("_open_clip_tables")
    package.__path__ = [str(open_clip_folder())]
    sys.modules.setdefault(package.__name__, package)
    return import_module(f"{package.__name__}.pretrained")
