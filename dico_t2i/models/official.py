"""Loads weights of the released class-conditional DiCo.

The release stores a 1x1 convolution as (out, in, 1, 1), where this package has a matrix (out, in). All other
differences are names.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dico_t2i.config import DiCoConfig, ablated
from dico_t2i.models.dico import STAGES, DiCo
from dico_t2i.models.network import Network

_STAGE_NAMES = dict(
    zip(
        STAGES,
        ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1"),
        strict=True,
    )
)
BLOCK_NAMES = {
    "modulation": "adaLN_modulation.1",
    "conv.expand": "conv1",
    "conv.depthwise": "conv2",
    "conv.attention": "ca.1",
    "conv.project": "conv3",
    "ffn.expand": "conv4",
    "ffn.project": "conv5",
}
_OTHER_NAMES = {
    "stem": "x_embedder.proj",
    "down1.conv": "down1_2.body.0",
    "down2.conv": "down2_3.body.0",
    "up2.conv": "up3_2.body.0",
    "up1.conv": "up2_1.body.0",
    "merge2": "reduce_chan_level2",
    "merge1": "reduce_chan_level1",
    "head.modulation": "final_layer.adaLN_modulation.1",
    "head.out": "final_layer.out_proj",
}
_POINTWISE = {
    "conv.expand",
    "conv.attention",
    "conv.project",
    "ffn.expand",
    "ffn.project",
    "merge1",
    "merge2",
}


def official_key(name: str) -> str:
    """The release's name of one of our parameters. Raises KeyError for the text parameters, which it does not have."""
    module, _, leaf = name.rpartition(".")
    head, *rest = module.split(".")
    if head == "stages":
        stage, index, inner = rest[0], rest[1], ".".join(rest[2:])
        return f"{_STAGE_NAMES[stage]}.{index}.{BLOCK_NAMES[inner]}.{leaf}"
    if head == "time_embeddings":
        return f"t_embedder_{int(rest[0]) + 1}.mlp.{'0' if rest[1] == 'hidden' else '2'}.{leaf}"
    if head == "condition_embeddings":
        return f"y_embedder.embedding_table_{rest[0]}.{leaf}"
    return f"{_OTHER_NAMES[module]}.{leaf}"


def official_shape(name: str, shape: torch.Size) -> tuple[int, ...]:
    """The shape of our parameter in the release."""
    module, _, leaf = name.rpartition(".")
    inner = ".".join(module.split(".")[3:]) if module.startswith("stages.") else module
    return (*shape, 1, 1) if leaf == "weight" and inner in _POINTWISE else tuple(shape)


def load_official_state_dict(model: DiCo, state: Mapping[str, Tensor]) -> None:
    """Copy a released state dict into a class-conditional model.

    Raises ValueError that names the keys that are missing, unexpected or of a different shape, or the ablation switches
    in which the model differs from the released one.
    """
    if model.config.condition != "class":
        raise ValueError("released weights are class-conditional; build the model with condition='class'")
    switches = ", ".join(f"{key}: {value}" for key, value in ablated(model.config).items())
    if switches:
        raise ValueError(f"released weights are of DiCo as published; build the model without {switches}")
    copy_released(model, state, official_key, official_shape)


def copy_released(
    model: Network,
    state: Mapping[str, Tensor],
    key_of: Callable[[str], str],
    shape_of: Callable[[str, torch.Size], tuple[int, ...]],
) -> None:
    """Copy a state dict into a model; key_of and shape_of give the release's names and shapes of our parameters.

    Raises ValueError that names the keys that are missing, unexpected or of a different shape.
    """
    parameters = dict(model.named_parameters())
    wanted = {key_of(name): name for name in parameters}
    problems = [f"missing {key}" for key in wanted.keys() - state.keys()]
    problems += [f"unexpected {key}" for key in state.keys() - wanted.keys()]
    for key in wanted.keys() & state.keys():
        name = wanted[key]
        expected = tuple(shape_of(name, parameters[name].shape))
        if tuple(state[key].shape) != expected:
            problems.append(f"{key} is {tuple(state[key].shape)}, this model needs {expected}")
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise ValueError(f"not a state dict of this {type(model).__name__} ({len(problems)} differences): {shown}")
    with torch.no_grad():
        for key, name in wanted.items():
            parameters[name].copy_(state[key].reshape(parameters[name].shape))


def read_official(path: str | Path) -> dict[str, Tensor]:
    """The EMA weights of a released checkpoint file, or its only weights. No code in the file is executed.

    The file is in torch's or safetensors' format. Raises ValueError for a file that holds anything else.
    """
    content = _read(Path(path))
    for key in ("ema", "model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: holds no state dict, neither directly nor under ema, model or state_dict")
    return {key.removeprefix("module."): value for key, value in content.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: not a file of weights that can be read safely: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


def infer_config(state: Mapping[str, Tensor]) -> DiCoConfig:
    """The dimensions of a released state dict, derived from its shapes. Raises ValueError if it is not a DiCo's."""
    try:
        stem, table = state["x_embedder.proj.weight"], state["y_embedder.embedding_table_0.weight"]
        out = state["final_layer.out_proj.weight"]
        depths = [len({k.split(".")[1] for k in state if k.startswith(f"{s}.")}) for s in _STAGE_NAMES.values()]
        blocks = [k for k in state if k.endswith("conv4.weight")]
        hidden, width = state[blocks[0]].shape[:2]
    except (KeyError, IndexError):
        raise ValueError(
            "not a released DiCo or DiT state dict: DiCo's stem, label tables, head or blocks are missing"
        ) from None
    return DiCoConfig(
        hidden_size=stem.shape[0],
        depths=depths,  # type: ignore[arg-type]
        mlp_ratio=hidden / width,
        in_channels=stem.shape[1],
        learn_sigma=out.shape[0] == 2 * stem.shape[1],
        num_classes=table.shape[0] - 1,
    )
