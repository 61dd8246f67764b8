"""CLIP's text towers in the files of transformers."""

import gzip
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dico_t2i.config import TextTowerConfig
from dico_t2i.encoders.local import MissingModelError, check_whole, config_hash, read_json, reading, resolve
from dico_t2i.encoders.text.clip_tower import END, TOKENS, VOCABULARY, ClipSettings, ClipTextTower
from dico_t2i.encoders.text.features import FeatureSize, TextFeatures, TowerSize
from dico_t2i.encoders.text.tokenizers import FastTokenizer
from dico_t2i.encoders.text.tower import Tower

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


_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip_features(output: Any) -> TextFeatures:
    """The features in a transformers output; the pooled feature is projected if the tower has a projection."""
    return TextFeatures(
        output.last_hidden_state, output.text_embeds if "text_embeds" in output else output.pooler_output
    )


class TransformersTokenizer(FastTokenizer):
    """CLIP's tokenizer from transformers; it pads with the end token."""

    name = "transformers CLIPTokenizer"

    def __init__(self, backend: Any) -> None:
        super().__init__(backend, TOKENS, END, _END)

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
    settings_file, weights, vocabulary, merges = files(config)
    settings = read_json(settings_file)
    if settings.get("model_type") not in ("clip", "clip_text_model"):
        raise ValueError(f"text_encoder.model: {settings_file} describes {settings.get('model_type')!r}, not CLIP")
    tokenizer = _backend(*_vocabulary(vocabulary, merges))
    found = tokenizer.get_vocab_size(with_added_tokens=True)
    if found != VOCABULARY:
        raise ValueError(f"{vocabulary}: CLIP has {VOCABULARY} tokens, found {found}; download it again")
    size = ClipSettings.of(settings)
    check_size(size.max_position_embeddings, size.vocab_size, "text_encoder.model", config.model)
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten
        module = ClipTextTower(size, projected="CLIPTextModel" not in settings.get("architectures", ()))
    _read_weights(module, weights)
    return Tower(
        module,
        TransformersTokenizer(tokenizer),
        features,
        f"pretrained text tower {config.model} (transformers)",
        {"model": Path(config.model).name, "weights": weights, "config": config_hash(settings)},
        config.kind,
    )


def _read_weights(module: nn.Module, weights: Path) -> None:
    """Load a tower from a file that may hold a whole CLIP. Raises ValueError if weights are missing or do not fit."""
    wanted = module.state_dict().keys()
    with reading(weights):
        if weights.suffix == ".bin":
            held = torch.load(weights, map_location="cpu", weights_only=True)
            state = {name: held[key] for name, key in _named(wanted, held).items()}
        else:
            from safetensors import safe_open

            with safe_open(weights, "pt") as file:
                state = {name: file.get_tensor(key) for name, key in _named(wanted, file.keys()).items()}
        report = module.load_state_dict(state, strict=False)
    check_whole(weights, {"missing_keys": report.missing_keys})


def _named(wanted: Iterable[str], held: Iterable[str]) -> dict[str, str]:
    """The key of each weight in a file: its name, in most files after ``text_model.``."""
    keys = {key.removeprefix("text_model."): key for key in held}
    return {name: keys[name] for name in wanted if name in keys}


def features(tower: Tower, ids: Tensor) -> TextFeatures:
    """Features of token ids (N, 77)."""
    return TextFeatures(*tower.module(ids))


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
    settings = ClipSettings(
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        hidden_act="gelu",
        pad_token_id=END,
    )
    return ClipTextTower(settings, projected=False), clip_tokenizer()


def clip_tokenizer() -> TransformersTokenizer:
    """CLIP's tokenizer, made without the files of a model."""
    return TransformersTokenizer(clip_backend())


def clip_backend() -> Any:
    """CLIP's tokenizer, made from the byte pair merges that open_clip contains."""
    from tokenizers.pre_tokenizers import ByteLevel

    lines = gzip.decompress((open_clip_folder() / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    letters = sorted(ByteLevel.alphabet())
    whole = [letter + "</w>" for letter in letters]
    merges = lines[1 : 1 + VOCABULARY - 2 - 2 * len(letters)]  # the first line is a comment
    joined = [merge.replace(" ", "") for merge in merges]
    vocabulary = [*letters, *whole, *joined, _START, _END]
    return _backend({token: number for number, token in enumerate(vocabulary)}, _pairs(merges))


def _vocabulary(vocabulary: Path, merges: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The token ids and merges in a tokenizer's files."""
    if vocabulary.name == "tokenizer.json":
        model = read_json(vocabulary).get("model", {})
        return model.get("vocab", {}), _pairs(model.get("merges", []))
    return read_json(vocabulary), _pairs(merges.read_text(encoding="utf-8").splitlines()[1:])  # the first is a comment


def _pairs(merges: Iterable[str | Sequence[str]]) -> list[tuple[str, str]]:
    """Merges as pairs; files have them as pairs, or as two words with a space between them."""
    pairs = (merge.split() if isinstance(merge, str) else merge for merge in merges)
    return [(pair[0], pair[1]) for pair in pairs if pair]


def _backend(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """The tokenizer that transformers makes for CLIP from these token ids and merges."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    bpe = {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "fuse_unk": False, "unk_token": _END}
    backend: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **bpe))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (_START, _END)])
    end, start = ((token, backend.token_to_id(token)) for token in (_END, _START))
    backend.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    return backend


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
