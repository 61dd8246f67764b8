"""CLIP's text towers from transformers."""

import gzip
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dico_t2i.config import TextTowerConfig
from dico_t2i.encoders.local import MissingModelError, config_hash, load_transformers, read_json, resolve
from dico_t2i.encoders.text.features import FeatureSize, TextFeatures, TowerSize
from dico_t2i.encoders.text.tokenizers import FastTokenizer
from dico_t2i.encoders.text.tower import Tower

TOKENS = 77
VOCABULARY = 49408
START, END = VOCABULARY - 2, VOCABULARY - 1


# The content of config.json for this hub id, for machines that do not have the file.
KNOWN: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": {
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
        "projection_dim": 768,
    }
}


_FILES = (
    ("config.json",),
    ("model.safetensors", "pytorch_model.bin"),
    # The tokenizer is either one file, or a vocabulary and its merges.
    ("tokenizer.json", "vocab.json"),
    ("tokenizer.json", "merges.txt"),
)


def clip_features(output: Any) -> TextFeatures:
    """The features in a transformers output; the pooled feature is projected if the tower has a projection."""
    return TextFeatures(
        output.last_hidden_state, output.text_embeds if "text_embeds" in output else output.pooler_output
    )


class TransformersTokenizer(FastTokenizer):
    """CLIP's tokenizer from transformers; it pads with the end token."""

    name = "transformers CLIPTokenizer"

    def __init__(self, backend: Any) -> None:
        super().__init__(backend, TOKENS, END, "<|endoftext|>")

    def save(self, folder: Path) -> None:
        """Write the files that ``CLIPTokenizer.from_pretrained`` reads."""
        from transformers import CLIPTokenizer

        CLIPTokenizer(tokenizer_object=self._backend, model_max_length=TOKENS).save_pretrained(folder)


def files(config: TextTowerConfig) -> list[Path]:
    """Settings, weights and tokenizer. Raises MissingModelError if one cannot be found."""
    return resolve(config.model, _FILES, "text_encoder.model")


def source(config: TextTowerConfig) -> str:
    """The folder or hub id that the tower comes from."""
    return config.model


def load(config: TextTowerConfig) -> Tower:
    """Load the tower of a folder or hub id. Raises ValueError if it is not a CLIP with 77 positions."""
    settings_file, weights, vocabulary, _ = files(config)
    settings = read_json(settings_file)
    if settings.get("model_type") not in ("clip", "clip_text_model"):
        raise ValueError(f"text_encoder.model: {settings_file} describes {settings.get('model_type')!r}, not CLIP")
    import transformers

    tokenizer = transformers.CLIPTokenizer.from_pretrained(vocabulary.parent, local_files_only=True)
    if len(tokenizer) != VOCABULARY:
        raise ValueError(f"{vocabulary}: CLIP has {VOCABULARY} tokens, found {len(tokenizer)}; download it again")
    plain = "CLIPTextModel" in settings.get("architectures", ())
    model = transformers.CLIPTextModel if plain else transformers.CLIPTextModelWithProjection
    module = load_transformers(model, settings_file.parent, weights)
    check_size(module.config.max_position_embeddings, module.config.vocab_size, "text_encoder.model", config.model)
    return Tower(
        module,
        TransformersTokenizer(tokenizer.backend_tokenizer),
        features,
        f"pretrained text tower {config.model} (transformers)",
        {"model": Path(config.model).name, "weights": weights, "config": config_hash(settings)},
        config.kind,
    )


def features(tower: Tower, ids: Tensor) -> TextFeatures:
    """Features of token ids (N, 77)."""
    return clip_features(tower.module(input_ids=ids))


def settings_of(config: TextTowerConfig) -> Any:
    """The tower's config.json, or its known content for the hub id. Raises MissingModelError if there is neither."""
    return known_settings(config.model, KNOWN)


def known_settings(model: str, known: Mapping[str, Any]) -> Any:
    """A model's config.json, or its known content. Raises MissingModelError if there is neither."""
    try:
        return read_json(resolve(model, [("config.json",)], "text_encoder.model")[0])
    except MissingModelError:
        if model not in known:
            raise
        return known[model]


def size(config: TextTowerConfig, settings: Any) -> TowerSize:
    """The tower's sizes; ``settings`` is its config.json."""
    text = settings.get("text_config", settings)
    width = text.get("hidden_size", 512)
    projected = "CLIPTextModel" not in settings.get("architectures", ())
    pooled = settings.get("projection_dim", 512) if projected else width
    return clip_size(width, text.get("intermediate_size", 2048), text.get("num_hidden_layers", 12), pooled)


def seeded_size(config: TextTowerConfig) -> TowerSize:
    """The sizes of a seeded tower."""
    tower = config.seeded
    return clip_size(tower.width, 4 * tower.width, tower.layers, tower.width)


def clip_size(width: int, inner: int, layers: int, pooled: int) -> TowerSize:
    """The sizes of a CLIP text tower; inner is the hidden width of a feed-forward."""
    return TowerSize(
        FeatureSize(TOKENS, width, pooled), layers * (4 * width**2 + 2 * width * inner), VOCABULARY * width
    )


def seeded(config: TextTowerConfig) -> tuple[nn.Module, TransformersTokenizer]:
    """A tower of the config's size and CLIP's tokenizer; its weights are set afterwards."""
    size = config.seeded
    from transformers import CLIPTextConfig, CLIPTextModel

    settings = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=TOKENS,
        hidden_act="gelu",
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
    )
    return CLIPTextModel(settings), clip_tokenizer()


def clip_tokenizer() -> TransformersTokenizer:
    """CLIP's tokenizer, made without the files of a model."""
    return TransformersTokenizer(clip_backend())


def clip_backend() -> Any:
    """CLIP's tokenizer, made from the byte pair merges that open_clip contains."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    lines = gzip.decompress((open_clip_folder() / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    letters = sorted(ByteLevel.alphabet())
    whole = [letter + "</w>" for letter in letters]
    merges = lines[1 : 1 + VOCABULARY - 2 - 2 * len(letters)]  # the first line is a comment
    joined = [merge.replace(" ", "") for merge in merges]
    vocabulary = [*letters, *whole, *joined, "<|startoftext|>", "<|endoftext|>"]
    ids = {token: number for number, token in enumerate(vocabulary)}
    pairs = [tuple(merge.split()) for merge in merges]
    return CLIPTokenizer(vocab=ids, merges=pairs).backend_tokenizer


def open_clip_folder() -> Path:
    """The folder of the package open_clip, without importing it."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def check_size(positions: int, vocabulary: int, key: str, name: str) -> None:
    """Raise ValueError for a tower that does not have CLIP's number of positions and tokens."""
    if (positions, vocabulary) != (TOKENS, VOCABULARY):
        raise ValueError(
            f"{key}: {name} has {positions} positions and {vocabulary} tokens, but CLIP has {TOKENS} and {VOCABULARY}"
        )
