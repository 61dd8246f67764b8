"""Released class-conditional checkpoints as exported folders of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dico_t2i.config import VARIANTS, Config, DiCoConfig, parse_config
from dico_t2i.encoders.local import file_hash
from dico_t2i.export import check_new, write_folder
from dico_t2i.models import DiCo
from dico_t2i.models.official import infer_config, load_official_state_dict, read_official

# Steps, batch, learning rate and betas of the paper's table 11; XL is the one for 256 pixels, at 512 it took 3M steps.
_RECIPES: dict[str, dict[str, Any]] = {
    "DiCo-S": {"steps": 400_000},
    "DiCo-B": {"steps": 400_000},
    "DiCo-L": {"steps": 400_000},
    "DiCo-XL": {"steps": 3_750_000},
    "DiCo-H": {"steps": 1_000_000, "batch": 1024, "lr": 2e-4, "betas": (0.99, 0.99), "warmup": {"steps": 5000}},
}


def import_official(file: Path, out: Path, image_size: int, autoencoder: str | None, encoders: bool) -> str:
    """Write the folder ``out`` from a released file of weights. Returns the variant's name, "DiCo" for other sizes.

    file: a torch file, of which nothing is executed, or safetensors; the EMA weights are taken if it has several.
    image_size: what it was trained on, which weights do not tell. autoencoder: a folder or hub id instead of
    sd-vae-ft-ema. encoders: copy the autoencoder. Raises ValueError (MissingModelError) saying what does not fit.
    """
    check_new(out)
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    state = read_official(file)
    with torch.device("meta"):
        model = DiCo(infer_config(state))
    load_official_state_dict(model.to_empty(device="cpu"), state)
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


def variant_name(model: DiCoConfig) -> str:
    """The released size that a network has; "DiCo" if it has another."""
    own = (model.hidden_size, model.depths, model.mlp_ratio)
    return next((n for n, v in VARIANTS.items() if (v["hidden_size"], v["depths"], v["mlp_ratio"]) == own), "DiCo")


def _config(name: str, model: DiCoConfig, image_size: int, autoencoder: str | None) -> Config:
    """What the paper says of the released model; of another size, nothing but the network is known."""
    recipe = _RECIPES.get(name, {"steps": 1})
    optimizer = {key: recipe[key] for key in ("lr", "betas", "warmup") if key in recipe}
    steps = 3_000_000 if (name, image_size) == ("DiCo-XL", 512) else recipe["steps"]
    tree: Mapping[str, Any] = {
        "name": f"{name}-{image_size}".lower(),
        "model": model.model_dump(),
        "autoencoder": {"path": autoencoder} if autoencoder else {},
        "data": {"path": f"imagenet{image_size}", "image_size": image_size},
        "optimizer": optimizer,
        "train": {
            "duration": {"steps": steps},
            "global_batch": recipe.get("batch", 256),
            "precision": "fp32",
        },
    }
    return parse_config(tree, "import-official")
