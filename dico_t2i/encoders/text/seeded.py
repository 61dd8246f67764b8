"""Text towers with random frozen weights, the same bits on every machine, for those without pretrained ones."""

import hashlib
import math
from pathlib import Path

import torch
from torch import nn

from dico_t2i.config import TextTowerConfig
from dico_t2i.encoders.text.family import family
from dico_t2i.encoders.text.tower import Tower
from dico_t2i.randomness import uniform

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


def load_seeded(config: TextTowerConfig) -> Tower:
    """A random tower of the config's family and size. Raises ValueError if the heads do not divide its width."""
    size = config.seeded
    if size.width % size.heads:
        raise ValueError(f"text_encoder.seeded: width {size.width} is not divisible by heads {size.heads}")
    made = family(config.kind)
    with torch.random.fork_rng(devices=[]):  # the libraries' own start, overwritten below, draws from it
        module, tokenize = made.seeded(config)
    _fill(module, size.seed)
    text = f"width {size.width}, {size.layers} layers, {size.heads} heads, seed {size.seed}"
    sources: dict[str, str | Path] = {"model": f"seeded, {text}", "weights": _state_hash(module)}
    name = "text tower (T5)" if config.kind == "t5" else "text tower"
    description = f"seeded (random, untrained) {name}: {text}"
    return Tower(module, tokenize, made.features, description, sources, config.kind, seeded=True)


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
