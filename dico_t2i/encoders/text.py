"""Frozen text towers: captions to token features, and one pooled feature of CLIP's; one tower, or several at once.

Two libraries give the same features of CLIP for the same weights and token ids, but they pad differently: after the
end token open_clip writes 0, transformers repeats the end token. The network sees those positions, so
tokenizer and pad id are part of an encoder's identity. T5's towers do not look at their padding, and their features are
zeros there, by which a network can tell it from tokens.
"""

import gzip
import hashlib
import importlib.util
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dico_t2i.config import SeededTower, TextEncoderConfig, TextTowerConfig
from dico_t2i.encoders.local import (
    config_hash,
    file_hash,
    load_transformers,
    quiet_transformers,
    read_json,
    reading,
    resolve,
)
from dico_t2i.randomness import uniform

TOKENS = 77
VOCABULARY = 49408
START, END = VOCABULARY - 2, VOCABULARY - 1

# Data workers are forked, after which the threads of the tokenizers library would hang.
os.environ["TOKENIZERS_PARALLELISM"] = "false"


class TextFeatures(NamedTuple):
    """tokens: (N, T, width), after the final layer norm. pooled: (N, pooled_dim), at the end token; T5 has none (N, 0).

    T is 77 of CLIP. Of several towers the tokens follow one another, padded with zeros to the widest's width, and the
    pooled features lie side by side.
    """

    tokens: Tensor
    pooled: Tensor


def clip_features(output: Any) -> TextFeatures:
    """What a text tower of transformers says: its projected pooled feature if it has the projection."""
    return TextFeatures(
        output.last_hidden_state, output.text_embeds if "text_embeds" in output else output.pooler_output
    )


class Tokenizer(Protocol):
    """Captions to token ids; picklable, for data workers."""

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(N,) strings -> (N, T) int64."""


class TowerTokenizer(Tokenizer, Protocol):
    """Of one tower: T is ``tokens``, captions are cut with the end token last, or padded with ``pad_id``."""

    name: str
    pad_id: int
    tokens: int


class _FastTokenizer:
    """A tokenizer of the tokenizers library; its post-processor adds the end token."""

    def __init__(self, backend: Any, tokens: int, pad_id: int, pad_token: str) -> None:
        self._backend, self.tokens, self.pad_id = backend, tokens, pad_id
        self._backend.enable_truncation(tokens)
        self._backend.enable_padding(length=tokens, pad_id=pad_id, pad_token=pad_token)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        rows = [encoding.ids for encoding in self._backend.encode_batch(list(captions))]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, self.tokens)


class T5Tokenizer(_FastTokenizer):
    """T5's tokenizer: no start token, and padding of its own."""

    name = "tokenizers T5"


class TransformersTokenizer(_FastTokenizer):
    """CLIP's tokenizer as transformers has it; pads with the end token."""

    name = "transformers CLIPTokenizer"

    def __init__(self, backend: Any) -> None:
        super().__init__(backend, TOKENS, END, "<|endoftext|>")

    def save(self, folder: Path) -> None:
        """Write it as ``CLIPTokenizer.from_pretrained`` reads it."""
        from transformers import CLIPTokenizer

        CLIPTokenizer(tokenizer_object=self._backend, model_max_length=TOKENS).save_pretrained(folder)


class OpenClipTokenizer:
    """CLIP's tokenizer as open_clip has it; pads with 0."""

    name = "open_clip SimpleTokenizer"
    pad_id = 0
    tokens = TOKENS

    def __init__(self) -> None:
        from open_clip import SimpleTokenizer

        self._backend = SimpleTokenizer()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return self._backend(list(captions), TOKENS)


class JointTokenizer:
    """Several tokenizers' ids, one after the other."""

    def __init__(self, parts: Sequence[TowerTokenizer]) -> None:
        self.parts = parts

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return torch.cat([part(captions) for part in self.parts], dim=1)


class TextEncoder:
    """Frozen text towers, one or several, and their tokenizers.

    tokenize: captions -> (N, T) int64; hand it to data workers by itself, it does not hold the towers.
    sizes: of each tower's features; width, pooled_dim: of all together. seeded: a tower is random, not pretrained.
    description: one line, to be printed with results.
    """

    def __init__(self, towers: Sequence["_Tower"], device: torch.device, dtype: torch.dtype) -> None:
        self.seeded = any(tower.seeded for tower in towers)
        self.description = " + ".join(tower.description for tower in towers)
        parts = [tower.tokenize for tower in towers]
        self.tokenize: Tokenizer = JointTokenizer(parts) if len(parts) > 1 else parts[0]
        self._towers, self._device = towers, device
        for tower in towers:
            tower.module.to(device, dtype).eval().requires_grad_(False)
        nulls = self._encode_each(self.tokenize([""]))
        self.sizes = [FeatureSize(n.tokens.shape[1], n.tokens.shape[2], n.pooled.shape[1]) for n in nulls]
        self._null = _joined(nulls)
        self.width, self.pooled_dim = self._null.tokens.shape[-1], self._null.pooled.shape[-1]

    def encode(self, ids: Tensor) -> TextFeatures:
        """Features of token ids, in the towers' dtype. (N, T) int64 on any device."""
        return _joined(self._encode_each(ids))

    @torch.no_grad()
    def _encode_each(self, ids: Tensor) -> list[TextFeatures]:
        parts = ids.to(self._device, non_blocking=True).split([tower.tokenize.tokens for tower in self._towers], dim=1)
        return [tower.encode(part) for tower, part in zip(self._towers, parts, strict=True)]

    def null(self) -> TextFeatures:
        """Features of the empty caption, which guidance starts from; N = 1."""
        return self._null

    def save(self, tower: Path, tokenizer: Path) -> str:
        """Write tower and tokenizer as transformers reads them. Returns the tower's class.

        Raises ValueError for all but one CLIP of transformers.
        """
        if not isinstance(self.tokenize, TransformersTokenizer):
            raise ValueError("text_encoder: only one CLIP of transformers can be written in its format")
        module: Any = self._towers[0].module
        with quiet_transformers():
            module.save_pretrained(tower)
        self.tokenize.save(tower)  # for us, who want a model in one place
        self.tokenize.save(tokenizer)
        return type(module).__name__

    def identity(self) -> dict[str, str]:
        """What features depend on, weights, tokenizer and padding among it. Reads the weights files."""
        first, *others = self._towers
        also = {f"also.{n}.{key}": v for n, tower in enumerate(others) for key, v in tower.identity().items()}
        return {**first.identity(), **also}


class FeatureSize(NamedTuple):
    """Of a tower's features: (N, tokens, width), (N, pooled_dim)."""

    tokens: int
    width: int
    pooled_dim: int


@dataclass(frozen=True)
class _Tower:
    """A text tower as loaded. sources: parts of its identity; a path stands for the hash of its file."""

    module: nn.Module
    tokenize: TowerTokenizer
    description: str
    sources: dict[str, str | Path]
    kind: str
    seeded: bool = False

    def encode(self, ids: Tensor) -> TextFeatures:
        if self.kind == "open_clip":
            pooled, tokens = self.module(ids)
            return TextFeatures(tokens, pooled)
        if self.kind == "transformers":
            return clip_features(self.module(input_ids=ids))
        known = ids != self.tokenize.pad_id
        tokens = self.module(input_ids=ids, attention_mask=known).last_hidden_state * known[..., None]
        return TextFeatures(tokens, tokens.new_empty(len(tokens), 0))

    def identity(self) -> dict[str, str]:
        sources = {key: file_hash(v) if isinstance(v, Path) else v for key, v in self.sources.items()}
        return {
            "kind": self.kind,
            "seeded": str(self.seeded).lower(),
            "tokenizer": self.tokenize.name,
            "pad_id": str(self.tokenize.pad_id),
            **({"tokens": str(self.tokenize.tokens)} if self.kind == "t5" else {}),
            **sources,
        }


def _joined(features: Sequence[TextFeatures]) -> TextFeatures:
    if len(features) == 1:
        return features[0]
    width = max(tokens.shape[-1] for tokens, _ in features)
    padded = [F.pad(tokens, (0, width - tokens.shape[-1])) for tokens, _ in features]
    return TextFeatures(torch.cat(padded, dim=1), torch.cat([pooled for _, pooled in features], dim=1))


def load_text_encoder(
    config: TextEncoderConfig, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """The text encoder of a config, in eval mode.

    Raises MissingModelError, before any heavy import, when its files are not here, and ValueError when they
    are not those of a CLIP text tower with 77 positions, or of a T5.
    """
    find_text_encoder(config)  # of all towers, before the first is loaded
    towers = []
    for number, tower in enumerate(config.towers):
        with naming(number):
            load = _seeded_tower if tower.weights == "seeded" else _LOADERS[tower.kind]
            towers.append(load(tower))
    return TextEncoder(towers, torch.device(device), dtype)


def find_text_encoder(config: TextEncoderConfig) -> list[Path]:
    """The files of all towers; none of seeded ones. Raises MissingModelError when one is not here."""
    files = []
    for number, tower in enumerate(config.towers):
        with naming(number):
            files += find_tower(tower)
    return files


def find_tower(config: TextTowerConfig) -> list[Path]:
    """The files of one tower; none of a seeded one. Raises MissingModelError when one is not here."""
    if config.weights == "seeded":
        return []
    if config.kind == "open_clip":
        return _open_clip_files(config, _open_clip_tag(config.model, config.pretrained))
    return _t5_files(config) if config.kind == "t5" else resolve(config.model, _FILES, "text_encoder.model")


def pretrained_source(config: TextTowerConfig) -> str:
    """The folder, hub id or file that a pretrained tower comes from."""
    if config.kind != "open_clip" or Path(config.pretrained).is_file():
        return config.model if config.kind != "open_clip" else config.pretrained
    return _open_clip_place(config, _open_clip_tag(config.model, config.pretrained))[0]


@contextmanager
def naming(number: int) -> Iterator[None]:
    """Errors name keys of the first tower; those of others get their place in the list."""
    try:
        yield
    except ValueError as error:
        if number == 0:
            raise
        raise type(error)(str(error).replace("text_encoder.", f"text_encoder.also.{number - 1}.")) from error


# --- transformers

_FILES = (
    ("config.json",),
    ("model.safetensors", "pytorch_model.bin"),
    # Either one file, or a vocabulary and its merges.
    ("tokenizer.json", "vocab.json"),
    ("tokenizer.json", "merges.txt"),
)


def _transformers_tower(config: TextTowerConfig) -> _Tower:
    settings_file, weights, vocabulary, _ = resolve(config.model, _FILES, "text_encoder.model")
    settings = read_json(settings_file)
    if settings.get("model_type") not in ("clip", "clip_text_model"):
        raise ValueError(f"text_encoder.model: {settings_file} is of {settings.get('model_type')!r}, not of CLIP")
    import transformers

    tokenizer = transformers.CLIPTokenizer.from_pretrained(vocabulary.parent, local_files_only=True)
    if len(tokenizer) != VOCABULARY:
        raise ValueError(f"{vocabulary}: CLIP has {VOCABULARY} tokens, found {len(tokenizer)}; fetch it again")
    plain = "CLIPTextModel" in settings.get("architectures", ())
    model = transformers.CLIPTextModel if plain else transformers.CLIPTextModelWithProjection
    module = load_transformers(model, settings_file.parent, weights)
    _check_size(module.config.max_position_embeddings, module.config.vocab_size, "text_encoder.model", config.model)
    return _Tower(
        module,
        TransformersTokenizer(tokenizer.backend_tokenizer),
        f"pretrained text tower {config.model} (transformers)",
        {"model": Path(config.model).name, "weights": weights, "config": config_hash(settings)},
        config.kind,
    )


def _clip_tokenizer() -> TransformersTokenizer:
    return TransformersTokenizer(_clip_backend())


def _clip_backend() -> Any:
    """CLIP's tokenizer, from the byte pair merges that open_clip comes with."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    lines = gzip.decompress((_open_clip_folder() / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    letters = sorted(ByteLevel.alphabet())
    whole = [letter + "</w>" for letter in letters]
    merges = lines[1 : 1 + VOCABULARY - 2 - 2 * len(letters)]  # the first line is a comment
    joined = [merge.replace(" ", "") for merge in merges]
    vocabulary = [*letters, *whole, *joined, "<|startoftext|>", "<|endoftext|>"]
    ids = {token: number for number, token in enumerate(vocabulary)}
    pairs = [tuple(merge.split()) for merge in merges]
    return CLIPTokenizer(vocab=ids, merges=pairs).backend_tokenizer


# --- T5

_T5_INDEX = "model.safetensors.index.json"


def _t5_files(config: TextTowerConfig) -> list[Path]:
    """Settings, tokenizer, and weights in one file, or an index and its parts."""
    key = "text_encoder.model"
    settings, tokenizer, weights = resolve(
        config.model, (("config.json",), ("tokenizer.json",), ("model.safetensors", _T5_INDEX)), key
    )
    if weights.name != _T5_INDEX:
        return [settings, tokenizer, weights]
    names = sorted(set(read_json(weights).get("weight_map", {}).values()))
    return resolve(config.model, [(file.name,) for file in (settings, tokenizer, weights)] + [(n,) for n in names], key)


def _t5_tower(config: TextTowerConfig) -> _Tower:
    settings_file, vocabulary, *weights = _t5_files(config)
    settings = read_json(settings_file)
    if settings.get("model_type") != "t5":
        raise ValueError(f"text_encoder.model: {settings_file} is of {settings.get('model_type')!r}, not of T5")
    from tokenizers import Tokenizer as Backend
    from transformers import T5EncoderModel

    backend, pad = Backend.from_file(str(vocabulary)), settings.get("pad_token_id", 0)
    padding = backend.id_to_token(pad)
    if backend.get_vocab_size() > settings["vocab_size"] or padding is None:
        raise ValueError(f"{vocabulary}: {backend.get_vocab_size()} tokens are not those of {settings_file}")
    module = load_transformers(T5EncoderModel, settings_file.parent, weights[0])
    files = [path for path in weights if path.name != _T5_INDEX]
    return _Tower(
        module,
        T5Tokenizer(backend, config.tokens, pad, padding),
        f"pretrained text tower {config.model} (T5, {config.tokens} tokens)",
        {
            "model": Path(config.model).name,
            "vocabulary": vocabulary,
            **{"weights" + (f".{n}" if n else ""): path for n, path in enumerate(files)},
            "config": config_hash(settings),
        },
        config.kind,
    )


# --- open_clip

_CARD = "open_clip_config.json"


def _open_clip_tower(config: TextTowerConfig) -> _Tower:
    tag = _open_clip_tag(config.model, config.pretrained)
    weights = _open_clip_files(config, tag)[0]
    settings = open_clip_settings(config.model, weights)
    quick_gelu = bool(settings.get("quick_gelu") or tag.get("quick_gelu"))
    activation = "quick GELU" if quick_gelu else "GELU"
    module = _build_open_clip(settings["embed_dim"], settings["text_cfg"], quick_gelu)
    with reading(weights):
        module.load_state_dict(_open_clip_state(weights))
    return _Tower(
        module,
        OpenClipTokenizer(),
        f"pretrained text tower {config.model} {config.pretrained} (open_clip, {activation})",
        {
            "model": f"{config.model} {Path(config.pretrained).name}",
            "weights": weights,
            "config": config_hash({**settings, "quick_gelu": quick_gelu}),
        },
        config.kind,
    )


def _open_clip_tag(model: str, pretrained: str) -> dict[str, Any]:
    """What open_clip knows of a tag of weights; empty if it is not a tag."""
    tables = _open_clip_tables()
    tag = tables.get_pretrained_cfg(model, pretrained)
    if not tag and "/" not in pretrained and not Path(pretrained).exists():
        raise ValueError(
            f"text_encoder.pretrained: {pretrained!r} is no file, no folder, no hub id, and no tag of {model}"
            f" (those are {', '.join(tables.list_pretrained_tags_by_model(model)) or 'none'})"
        )
    return tag


def _open_clip_files(config: TextTowerConfig, tag: dict[str, Any]) -> list[Path]:
    """The weights, and what lies beside them."""
    if Path(config.pretrained).is_file():
        return [Path(config.pretrained)]
    name, file = _open_clip_place(config, tag)
    names = (file,) if file else ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    # A folder has to say what its weights are made for (quick GELU or not). Of a tag that is known, so that a cache
    # which open_clip filled, with the weights alone, will do.
    card = (_CARD, *names) if tag else (_CARD,)
    return resolve(name, [names, card], "text_encoder.pretrained")


def _open_clip_place(config: TextTowerConfig, tag: dict[str, Any]) -> tuple[str, str]:
    """Folder or hub id, and the file's name there, empty for open_clip's own names."""
    name, _, file = (tag.get("hf_hub") or f"{config.pretrained}/").rpartition("/")
    return name, file


def open_clip_settings(model: str, weights: Path | None = None) -> dict[str, Any]:
    """The architecture: what stands beside the weights, else what open_clip has under that name."""
    beside = weights.with_name(_CARD) if weights else None
    packaged = _open_clip_folder() / "model_configs" / f"{model}.json"
    if beside and beside.is_file():
        settings = read_json(beside)["model_cfg"]
    elif packaged.is_file():
        settings = read_json(packaged)
    else:
        raise ValueError(f"text_encoder.model: open_clip has no architecture {model!r}; ViT-L-14 is one")
    text = settings["text_cfg"]
    if "hf_model_name" in text or text.get("embed_cls"):
        raise ValueError(f"text_encoder.model: the text tower of {model} is not CLIP's")
    _check_size(text.get("context_length", TOKENS), text.get("vocab_size", VOCABULARY), "text_encoder.model", model)
    return settings


def _open_clip_state(weights: Path) -> dict[str, Tensor]:
    """The text tower's part of a file of weights, whichever way open_clip laid it out."""
    if weights.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(weights)
    else:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    parts = {"token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection"}
    named = {name.removeprefix("module.").removeprefix("text."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in named.items() if name.split(".")[0] in parts}


def _build_open_clip(embed_dim: int | None, settings: dict[str, Any], quick_gelu: bool) -> nn.Module:
    from open_clip.model import _build_text_tower

    return _build_text_tower(embed_dim, {**settings, "output_tokens": True}, quick_gelu)


def _open_clip_folder() -> Path:
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _open_clip_tables() -> ModuleType:
    """open_clip's module of pretrained tags, without the seconds that importing all of open_clip takes.

    So a missing model is reported at once. It is imported as part of a package of another name over the same
    folder.
    """
    package = ModuleType("_open_clip_tables")
    package.__path__ = [str(_open_clip_folder())]
    sys.modules.setdefault(package.__name__, package)
    return import_module(f"{package.__name__}.pretrained")


def _check_size(positions: int, vocabulary: int, key: str, name: str) -> None:
    if (positions, vocabulary) != (TOKENS, VOCABULARY):
        raise ValueError(
            f"{key}: {name} has {positions} positions and {vocabulary} tokens;"
            f" needed are CLIP's {TOKENS} and {VOCABULARY}"
        )


# --- seeded


# Spread of the random weights, by a part of the parameter's name: of an embedding's values, of other values
# times sqrt(fan-in). Far from the usual start of training: what attention gathers from the words has to
# outweigh the end token's own embedding, or all captions would look alike there.
_SPREADS = {
    "token_embedding": 1.0,
    "position": 0.1,
    "in_proj": 0.8,  # open_clip's queries, keys and values
    "q_proj": 0.8,
    "k_proj": 0.8,
    "v_proj": 0.8,
    "out_proj": 4.0,
    "c_fc": 1.0,
    "fc1": 1.0,
    "c_proj": 0.2,
    "fc2": 0.2,
    "shared": 1.0,  # T5's embedding of tokens
    "relative_attention_bias": 0.1,
    "SelfAttention.q": 0.15,  # T5 does not divide products of queries and keys by the root of their length
    "SelfAttention.k": 0.8,
    "SelfAttention.v": 0.8,
    "SelfAttention.o": 4.0,
    "DenseReluDense.wi": 1.0,
    "DenseReluDense.wo": 0.2,
}
_TABLES = ("embedding", "shared", "relative_attention_bias")  # not products: no fan-in


def _seeded_tower(config: TextTowerConfig) -> _Tower:
    size = config.seeded
    if size.width % size.heads:
        raise ValueError(f"text_encoder.seeded: width {size.width} is not divisible by heads {size.heads}")
    with torch.random.fork_rng(devices=[]):  # the libraries' own start, overwritten below, draws from it
        if config.kind == "t5":
            module, tokenize = _seeded_t5(size, config.tokens)
        else:
            module, tokenize = _seeded_open_clip(size) if config.kind == "open_clip" else _seeded_transformers(size)
    _fill(module, size.seed)
    text = f"width {size.width}, {size.layers} layers, {size.heads} heads, seed {size.seed}"
    sources: dict[str, str | Path] = {"model": f"seeded, {text}", "weights": _state_hash(module)}
    name = "text tower (T5)" if config.kind == "t5" else "text tower"
    return _Tower(module, tokenize, f"seeded (random, untrained) {name}: {text}", sources, config.kind, seeded=True)


def _seeded_open_clip(size: SeededTower) -> tuple[nn.Module, TowerTokenizer]:
    settings = {"width": size.width, "heads": size.heads, "layers": size.layers}
    return _build_open_clip(None, settings, quick_gelu=False), OpenClipTokenizer()


def _seeded_transformers(size: SeededTower) -> tuple[nn.Module, TowerTokenizer]:
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
    return CLIPTextModel(settings), _clip_tokenizer()


def _seeded_t5(size: SeededTower, tokens: int) -> tuple[nn.Module, TowerTokenizer]:
    """With CLIP's vocabulary, and one more token for padding."""
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
    backend = _clip_backend()
    backend.post_processor = TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", END)])
    return T5EncoderModel(settings), T5Tokenizer(backend, tokens, VOCABULARY, "<pad>")


@torch.no_grad()
def _fill(tower: nn.Module, seed: int) -> None:
    """Weights from the seed, uniform, by integer arithmetic: the same bits on every machine."""
    for name, weight in tower.named_parameters():
        if weight.ndim == 1:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        rows, columns = weight.shape
        spread = next(value for part, value in _SPREADS.items() if part in name)
        if not any(part in name for part in _TABLES):
            spread /= math.sqrt(columns)
        numbers = uniform(seed, f"text tower {name}", torch.arange(rows), (columns,))
        weight.copy_((2 * numbers - 1) * (math.sqrt(3) * spread))


def _state_hash(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(module.named_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().numpy().tobytes())
    return digest.hexdigest()


_LOADERS = {"transformers": _transformers_tower, "open_clip": _open_clip_tower, "t5": _t5_tower}
