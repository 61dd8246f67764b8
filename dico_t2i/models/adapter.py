"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) of linear layers.

A layer's output W x becomes W x + factor B A x, where A (rank, in) is random and B (out, rank) starts at zero. While an
adapter is trained, A and B are parameters of their own; for sampling they are added to W, which costs nothing.

The file of an adapter has the keys that diffusers and peft use: transformer.<layer>.lora_A.weight and lora_B.weight.
The factor is part of B in a file, so that a reader who does not know alpha is right, too.
"""

import json
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dico_t2i.config import AdapterConfig, ConfigError
from dico_t2i.files import write_atomically

PREFIX = "transformer."
METADATA = "lora_adapter_metadata"  # where diffusers looks for the rank and alpha
ORIGIN = "dico"  # where this package writes the run and the step
TARGETS = (
    *("stages.*.conv.*", "stages.*.ffn.*", "stages.*.text.*"),
    *("text_input.*", "stage_text.*", "text_summary.*", "summary_*", "condition_*"),
)
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter; weight and bias are those of the layer that it replaces."""

    def __init__(self, layer: nn.Linear, rank: int, factor: float) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.factor = factor
        self.lora_A = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as in the authors' code and in peft
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.factor * self.lora_B(self.lora_A(x))


def add_adapter(network: nn.Module, config: AdapterConfig) -> None:
    """Freeze the network, and give an adapter to each linear layer that matches one of the config's patterns.

    Raises ConfigError, with the names of linear layers, if a pattern matches none.
    """
    network.requires_grad_(False)
    linear = {name: layer for name, layer in network.named_modules() if type(layer) is nn.Linear}
    for pattern in config.targets:
        if not any(fnmatchcase(name, pattern) for name in linear):
            examples = ", ".join(list(linear)[:: max(1, len(linear) // 8)])
            raise ConfigError(f"adapter.targets: {pattern} matches no linear layer; some of them are {examples}")
    for name, layer in linear.items():
        if any(fnmatchcase(name, pattern) for pattern in config.targets or TARGETS):
            network.set_submodule(name, AdaptedLinear(layer, config.rank, config.factor))


def merge_adapter(weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> None:
    """Add scale times an adapter to the weights that it belongs to, in place, with fp32 arithmetic.

    Both are by name; the adapter's names are those of its layers, with .lora_A.weight and .lora_B.weight. Raises
    ValueError, before anything is changed, if the adapter is of another network.
    """
    layers = dict.fromkeys(name.rpartition(".lora_")[0] for name in adapter)
    unfit = [layer for layer in layers if not _fits(layer, weights, adapter)]
    if unfit:
        raise ValueError(
            f"the adapter is of another network: {len(unfit)} of its {len(layers)} layers do not fit, such as"
            f" {unfit[0]}; use it with the model that it was trained on"
        )
    with torch.no_grad():
        for layer in layers:
            weight = weights[f"{layer}.weight"]
            down, up = (adapter[layer + part].to(weight.device, torch.float32) for part in (DOWN, UP))
            weight.copy_(weight.float() + scale * (up @ down))


def _fits(layer: str, weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> bool:
    weight, down, up = weights.get(f"{layer}.weight"), adapter.get(layer + DOWN), adapter.get(layer + UP)
    if weight is None or down is None or up is None or down.ndim != 2 or up.ndim != 2:
        return False
    return len(down) == up.shape[1] and weight.shape == (len(up), down.shape[1])


def write_adapter(path: Path, tensors: Mapping[str, Tensor], config: AdapterConfig, origin: Mapping[str, Any]) -> None:
    """Write the file of an adapter. tensors: those of the network, by name. origin: where it comes from."""
    layers = [name.removesuffix(DOWN) for name in tensors if name.endswith(DOWN)]
    known = {"r": config.rank, "lora_alpha": config.rank, "target_modules": layers}  # the factor is in the tensors
    metadata = {METADATA: json.dumps({PREFIX + k: v for k, v in known.items()}), ORIGIN: json.dumps(origin)}
    scaled = {PREFIX + name: config.factor * t if name.endswith(UP) else t for name, t in tensors.items()}
    write_atomically(path, save(scaled, {"format": "pt", **metadata}))


def adapter_origin(path: Path) -> dict[str, Any]:
    """Where the adapter in a file comes from; empty for a file that this package did not write."""
    with safe_open(path, framework="pt") as file:
        return dict(json.loads((file.metadata() or {}).get(ORIGIN, "{}")))


def read_adapter(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file, by the names of the network. Raises ValueError if it is not such a file."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: it is not a safetensors file of an adapter: {error}") from None
    other = [key for key in tensors if not (key.startswith(PREFIX) and key.endswith((DOWN, UP)))]
    if other or not tensors:
        raise ValueError(
            f"{path}: it is not an adapter of DiCo, whose keys are {PREFIX}<layer>{DOWN} and {UP[1:]};"
            f" it has {other[0] if other else 'none'}"
        )
    factor = metadata.get(f"{PREFIX}lora_alpha", 1) / metadata.get(f"{PREFIX}r", 1)
    return {key.removeprefix(PREFIX): factor * t if key.endswith(UP) else t for key, t in tensors.items()}
