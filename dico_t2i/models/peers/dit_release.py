"""Loads weights of the released DiT (facebookresearch/DiT)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dico_t2i.config import DIT_VARIANTS, DiTConfig
from dico_t2i.models.official import copy_released
from dico_t2i.models.peers.dit import DiT
from dico_t2i.models.peers.layers import grid_positions

POSITIONS = "pos_embed"  # stored with the weights, although it follows from the size
_BLOCK_NAMES = {
    "modulation": "adaLN_modulation.1",
    "attention.qkv": "attn.qkv",
    "attention.project": "attn.proj",
    "ffn.expand": "mlp.fc1",
    "ffn.project": "mlp.fc2",
}
_OTHER_NAMES = {
    "patches": "x_embedder.proj",
    "time_embedding.hidden": "t_embedder.mlp.0",
    "time_embedding.out": "t_embedder.mlp.2",
    "class_embedding": "y_embedder.embedding_table",
    "head_modulation": "final_layer.adaLN_modulation.1",
    "head": "final_layer.linear",
}


def released_key(name: str) -> str:
    """The release's name of one of our parameters."""
    module, _, leaf = name.rpartition(".")
    head, *rest = module.split(".")
    if head == "layers":
        return f"blocks.{rest[0]}.{_BLOCK_NAMES['.'.join(rest[1:])]}.{leaf}"
    return f"{_OTHER_NAMES[module]}.{leaf}"


def is_released_dit(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the key names of the released DiT."""
    return {POSITIONS, "blocks.0.attn.qkv.weight"} <= state.keys()


def infer_dit_config(state: Mapping[str, Tensor]) -> DiTConfig:
    """The dimensions of a released state dict, derived from its shapes.

    Raises ValueError for sizes other than S, B, L and XL, since no shape shows their number of heads.
    """
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        rows, classes = state["final_layer.linear.weight"].shape[0], state["y_embedder.embedding_table.weight"].shape[0]
    except (KeyError, ValueError):
        raise ValueError("not a released DiT state dict: its patches, label table or head are missing") from None
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    for sizes in DIT_VARIANTS.values():
        if (sizes["hidden_size"], sizes["depth"]) == (width, depth):
            return DiTConfig(
                **{**sizes, "patch_size": patch},
                in_channels=channels,
                learn_sigma=rows == 2 * channels * patch**2,
                num_classes=classes - 1,
            )
    raise ValueError(f"a DiT of width {width} with {depth} blocks is none of {', '.join(DIT_VARIANTS)}")


def load_released_dit(model: DiT, state: Mapping[str, Tensor]) -> int:
    """Copy a released state dict into a model; returns the height and width of the latents it was trained on.

    Raises ValueError that names the keys that are missing, unexpected or of a different shape, or whose position
    embedding is not DiT's.
    """
    copy_released(model, {k: v for k, v in state.items() if k != POSITIONS}, released_key, lambda _, shape: shape)
    positions = state[POSITIONS]
    side = math.isqrt(positions.numel() // model.config.hidden_size)
    ours = grid_positions(side, side, model.config.hidden_size, torch.device("cpu"))
    if positions.numel() != ours.numel() or not torch.allclose(positions.reshape(ours.shape).to(ours), ours, atol=1e-5):
        raise ValueError(f"{POSITIONS}: {tuple(positions.shape)} does not hold the fixed positions of a square grid")
    return side * model.config.patch_size
