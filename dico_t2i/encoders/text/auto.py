"""Text encoders of any family that transformers' AutoModel loads, such as BERT, RoBERTa and MiniLM."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dico_t2i.config import TextTowerConfig
from dico_t2i.encoders.local import load_transformers, read_json, resolve
from dico_t2i.encoders.text.clip import clip_backend
from dico_t2i.encoders.text.clip_tower import END, START, VOCABULARY
from dico_t2i.encoders.text.features import FeatureSize, TextFeatures, TowerSize
from dico_t2i.encoders.text.t5 import sources, weight_files
from dico_t2i.encoders.text.tokenizers import FastTokenizer
from dico_t2i.encoders.text.tower import Tower

_OWN_KIND = {"clip": "transformers", "clip_text_model": "transformers", "t5": "t5"}  # families with their own module
_POOLER = "pooler."  # a layer of BERT whose output is not used, and that many files lack


class AutoTokenizer(FastTokenizer):
    """The tokenizer of a model's tokenizer.json."""

    name = "tokenizers"


def files(config: TextTowerConfig) -> list[Path]:
    """Settings, tokenizer, and the weights in one file, or as an index and its parts."""
    return weight_files(config.model, ("model.safetensors", "pytorch_model.bin"))


def source(config: TextTowerConfig) -> str:
    """The folder, hub id or package that the tower comes from."""
    return config.model


def load(config: TextTowerConfig) -> Tower:
    """Load the tower. Raises ValueError for CLIP and T5, and for a model with fewer positions than ``tokens``."""
    settings_file, vocabulary, *weights = files(config)
    settings = read_json(settings_file)
    _check_family(settings, settings_file)
    import transformers
    from tokenizers import Tokenizer as Backend

    module = _encoder(load_transformers(transformers.AutoModel, settings_file.parent, weights[0], unused=_POOLER))
    backend = Backend.from_file(str(vocabulary))
    pad = _pad_id(settings, settings_file)
    padding = backend.id_to_token(pad)
    if padding is None or backend.get_vocab_size() > module.get_input_embeddings().num_embeddings:
        raise ValueError(f"{vocabulary}: its {backend.get_vocab_size()} tokens do not fit {settings_file}")
    _check_positions(module, config.tokens, pad, settings_file)
    return Tower(
        module,
        AutoTokenizer(backend, config.tokens, pad, padding),
        features,
        f"pretrained text tower {config.model} ({settings['model_type']}, {config.tokens} tokens)",
        sources(config, settings, vocabulary, weights),
        config.kind,
    )


def features(tower: Tower, ids: Tensor) -> TextFeatures:
    """Features of token ids (N, T), zero at the padding; the pooled feature is the mean of the tokens' features."""
    known = ids != tower.tokenize.pad_id
    known[:, 0] = True  # attention needs a token, and some models have none for an empty caption
    output = tower.module(input_ids=ids, attention_mask=known.to(ids.dtype)).last_hidden_state
    tokens = output * known[..., None]
    return TextFeatures(tokens, tokens.sum(dim=1) / known.sum(dim=1, keepdim=True))


def settings_of(config: TextTowerConfig) -> Any:
    """The tower's config.json. Raises MissingModelError."""
    return read_json(resolve(config.model, [("config.json",)], "text_encoder.model")[0])


def size(config: TextTowerConfig, settings: Any) -> TowerSize:
    """The tower's sizes, counted on a model without memory; ``settings`` is its config.json."""
    kind, rest = settings["model_type"], {key: value for key, value in settings.items() if key != "model_type"}
    _check_family(settings, Path(config.model))
    import transformers

    with torch.device("meta"):
        known = transformers.AutoConfig.for_model(kind, **rest)
        return _size_of(_encoder(transformers.AutoModel.from_config(known, trust_remote_code=False)), config.tokens)


def seeded_size(config: TextTowerConfig) -> TowerSize:
    """The sizes of a seeded tower."""
    with torch.device("meta"):
        return _size_of(_bert(config), config.tokens)


def seeded(config: TextTowerConfig) -> tuple[nn.Module, AutoTokenizer]:
    """A BERT with CLIP's vocabulary and one more token for padding; its weights are set afterwards."""
    return _bert(config), AutoTokenizer(clip_backend(), config.tokens, VOCABULARY, "<pad>")


def _bert(config: TextTowerConfig) -> nn.Module:
    from transformers import BertConfig, BertModel

    size = config.seeded
    settings = BertConfig(
        vocab_size=VOCABULARY + 1,
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=config.tokens,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=VOCABULARY,
    )
    return BertModel(settings, add_pooling_layer=False)


def _size_of(module: Any, tokens: int) -> TowerSize:
    width = int(module.config.hidden_size)
    table = sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Embedding))
    matrices = (w.numel() for name, w in module.named_parameters() if w.ndim > 1 and not name.startswith(_POOLER))
    return TowerSize(FeatureSize(tokens, width, width), sum(matrices) - table, table)


def _encoder(module: Any) -> Any:
    """The model itself, or of an encoder and a decoder the former."""
    return module.get_encoder() if module.config.is_encoder_decoder else module


def _check_family(settings: dict[str, Any], place: Path) -> None:
    family = settings.get("model_type")
    if family is None:
        raise ValueError(f"text_encoder.model: {place} does not name a model_type of transformers")
    if family in _OWN_KIND:
        raise ValueError(f"text_encoder.kind: {place} describes {family!r}; set text_encoder.kind={_OWN_KIND[family]}")


def _pad_id(settings: dict[str, Any], place: Path) -> int:
    """The token that pads, or else the end token, as in models that were trained without padding."""
    for key in ("pad_token_id", "eos_token_id"):
        found = settings.get(key)
        if found is not None:
            return int(found[0] if isinstance(found, list) else found)
    raise ValueError(f"{place}: it has neither a pad_token_id nor an eos_token_id, so that captions cannot be padded")


@torch.no_grad()
def _check_positions(module: Any, tokens: int, pad: int, place: Path) -> None:
    """Raise ValueError if the model cannot read so many tokens: families count their positions differently."""
    try:
        module(input_ids=torch.full((1, tokens), 0 if pad else 1))
    except (IndexError, RuntimeError) as error:
        raise ValueError(
            f"text_encoder.tokens: {tokens} are more than the model of {place} can read"
            f" (max_position_embeddings: {module.config.max_position_embeddings}): {error}"
        ) from None
