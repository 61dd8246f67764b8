"""Text towers with random frozen weights, equal bit for bit on every machine, for use without pretrained weights."""

import hashlib
import math
from pathlib import Path

import torch
from torch import nn

from dico_t2i.config import TextTowerConfig
from dico_t2i.encoders.text.family import family
from dico_t2i.encoders.text.tower import Tower
from dico_t2i.randomness import uniform

# The standard deviation of the random weights, by a part of the parameter's name; for matrices it is this value divided
# by sqrt(fan-in). The values differ from a usual initialisation: the information that attention gathers from the words
# has to outweigh the embedding of the end token, or all captions would have nearly the same feature there.
_SPREADS = {
    "token_embedding": 1.0,
    "position": 0.1,
    "in_proj": 0.8,  # queries, keys and values in open_clip
    "q_proj": 0.8,
    "k_proj": 0.8,
    "v_proj": 0.8,
    "out_proj": 4.0,
    "c_fc": 1.0,
    "fc1": 1.0,
    "c_proj": 0.2,
    "fc2": 0.2,
    "shared": 1.0,  # token embedding in T5
    "relative_attention_bias": 0.1,
    "SelfAttention.q": 0.15,  # T5 does not divide the logits by the square root of the head's width
    "SelfAttention.k": 0.8,
    "SelfAttention.v": 0.8,
    "SelfAttention.o": 4.0,
    "DenseReluDense.wi": 1.0,
    "DenseReluDense.wo": 0.2,
    "word_embeddings": 1.0,  # in BERT
    "token_type_embeddings": 0.1,
    "attention.self": 0.8,
    "attention.output": 4.0,
    "intermediate": 1.0,
    "output": 0.2,
}


_TABLES = ("embedding", "shared", "relative_attention_bias")  # tables, which have no fan-in


def load_seeded(config: TextTowerConfig) -> Tower:
    """A random tower of the config's family and size. Raises ValueError if the heads do not divide its width."""
    size = config.seeded
    if size.width % size.heads:
        raise ValueError(f"text_encoder.seeded: width {size.width} is not divisible by heads {size.heads}")
    made = family(config.kind)
    with torch.random.fork_rng(devices=[]):  # the libraries draw initial weights, which are overwritten below
        module, tokenize = made.seeded(config)
    _fill(module, size.seed)
    text = f"width {size.width}, {size.layers} layers, {size.heads} heads, seed {size.seed}"
    sources: dict[str, str | Path] = {"model": f"seeded, {text}", "weights": _state_hash(module)}
    name = {"t5": "text tower (T5)", "auto": "text tower (BERT)"}.get(config.kind, "text tower")
    description = f"seeded (random, untrained) {name}: {text}"
    return Tower(module, tokenize, made.features, description, sources, config.kind, seeded=True)


@torch.no_grad()
def _fill(tower: nn.Module, seed: int) -> None:
    """Set uniform weights from the seed by integer arithmetic, so that they are equal on every machine."""
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
