"""Converts released class-conditional checkpoints to exported folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dico_t2i.config import Config, NetworkConfig, SizedConfig, parse_config
from dico_t2i.encoders.local import file_hash
from dico_t2i.export.folder import check_new, write_folder
from dico_t2i.models import DiCo, Network, build_network
from dico_t2i.models.official import copy_released, infer_config, load_official_state_dict, read_official
from dico_t2i.models.peers import dim, dis
from dico_t2i.models.peers.dit import DiT
from dico_t2i.models.peers.dit_release import infer_dit_config, is_released_dit, load_released_dit

# Steps, batch size, learning rate and betas from table 11 of the paper, and from DiT's paper. Those of the XL sizes are
# for 256 pixels; at 512 pixels both were trained for 3M steps.
_RECIPES: dict[str, dict[str, Any]] = {
    "DiCo-S": {"steps": 400_000},
    "DiCo-B": {"steps": 400_000},
    "DiCo-L": {"steps": 400_000},
    "DiCo-XL": {"steps": 3_750_000},
    "DiCo-H": {"steps": 1_000_000, "batch": 1024, "lr": 2e-4, "betas": (0.99, 0.99), "warmup": {"steps": 5000}},
    **{name: {"steps": 400_000, "sampler": {"guidance": 1.5}} for name in ("DiT-S/2", "DiT-B/2", "DiT-L/2")},
    "DiT-XL/2": {"steps": 7_000_000, "sampler": {"guidance": 1.5}},
    # All sizes of these; how many steps they were trained for is not known here.
    "DiS": {"steps": 1, "batch": 128, "sampler": {"guidance": 1.5, "guidance_channels": "three"}},
    "DiM": {
        "steps": 1,
        "batch": 768,
        "lr": 2e-4,
        "betas": (0.99, 0.99),
        "warmup": {"steps": 5000},
        "diffusion": {"schedule": "scaled_linear"},
        "sampler": {"kind": "dpm++", "steps": 50, "guidance": 1.4},
    },
}
# A key that only the release of a peer has; its names of the parameters are those of our network.
_PEERS = {"in_blocks.0.mixer.A_b_log": dis, "a4m_adapter.pad_token": dim}


def import_official(file: Path, out: Path, image_size: int, autoencoder: str | None, encoders: bool) -> str:
    """Write the folder ``out`` from a file of released weights of DiCo, DiT, DiS or DiM. Returns the variant's name.

    file: a torch file, from which no code is executed, or safetensors; if it has several sets of weights, the EMA
    weights are used. image_size: the size in pixels that it was trained on, which the weights do not show. autoencoder:
    a folder or hub id instead of sd-vae-ft-ema. encoders: copy the autoencoder. Raises ValueError (MissingModelError)
    that says what does not fit.
    """
    check_new(out)
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    model = _load(read_official(file), image_size)
    name = variant_name(model.config)
    parameters = dict(model.named_parameters())
    write_folder(
        out,
        _config(name, model.config, image_size, autoencoder),
        {key: parameter.shape for key, parameter in parameters.items()},
        (parameter.detach().numpy() for parameter in parameters.values()),
        {"file": file.name, "sha256": file_hash(file), "weights": "as released"},
        {},
        encoders,
    )
    return name


def _load(state: Mapping[str, Tensor], image_size: int) -> Network:
    """The network of a released state dict, recognised by its keys and shapes, with its weights."""
    peer = next((module for key, module in _PEERS.items() if key in state), None)
    if peer is not None:
        config: SizedConfig = peer.infer_config(state)
        _check_size(8 * config.latent_size, image_size)
        model = build_network(config)
        copy_released(model, state, lambda name: name, lambda _, shape: tuple(shape))
        return model
    if not is_released_dit(state):
        with torch.device("meta"):
            model = DiCo(infer_config(state))
        load_official_state_dict(model.to_empty(device="cpu"), state)
        return model
    with torch.device("meta"):
        dit = DiT(infer_dit_config(state))
    _check_size(8 * load_released_dit(dit.to_empty(device="cpu"), state), image_size)
    return dit


def _check_size(pixels: int, image_size: int) -> None:
    """Raise ValueError if the weights are for another size of images than the one that is asked for."""
    if pixels != image_size:
        raise ValueError(
            f"--image-size {image_size}: the position embedding is for {pixels} pixels; give --image-size {pixels}"
        )


def variant_name(model: NetworkConfig) -> str:
    """The name of a network's size, such as "DiCo-XL"; "DiCo", "DiT" and so on if the size has no name."""
    sizes = type(model).variants.items()
    named = (name for name, size in sizes if all(getattr(model, key) == value for key, value in size.items()))
    return next(named, type(model).__name__.removesuffix("Config"))


def _config(name: str, model: NetworkConfig, image_size: int, autoencoder: str | None) -> Config:
    """The config that the paper gives for the released model; for other sizes only the network is known."""
    recipe = _RECIPES.get(name) or _RECIPES.get(name.split("-")[0], {"steps": 1})
    optimizer = {key: recipe[key] for key in ("lr", "betas", "warmup") if key in recipe}
    steps = 3_000_000 if name in ("DiCo-XL", "DiT-XL/2") and image_size == 512 else recipe["steps"]
    tree: Mapping[str, Any] = {
        "name": f"{name}-{image_size}".lower().replace("/", "-"),
        "model": model.model_dump(),
        "autoencoder": {"path": autoencoder} if autoencoder else {},
        "data": {"path": f"imagenet{image_size}", "image_size": image_size},
        "optimizer": optimizer,
        "train": {
            "duration": {"steps": steps},
            "global_batch": recipe.get("batch", 256),
            "precision": "fp32",
        },
        "diffusion": recipe.get("diffusion", {}),
        "sampler": recipe.get("sampler", {}),
    }
    return parse_config(tree, "import-official")
