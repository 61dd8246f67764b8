"""Loads an exported folder as a pipeline of diffusers, without executing the code in the folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from dico_t2i.export.portable.pipeline import DiCoPipeline
from dico_t2i.export.portable.transformer import DiCoTransformer


def load_portable(folder: Path, dtype: torch.dtype | None, parts: Mapping[str, Any]) -> DiCoPipeline:
    """See ``dico_t2i.pipeline.DiCoPipeline.from_pretrained``."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: not a folder that dico export wrote (no model_index.json)")
    index = DiCoPipeline.load_config(folder)
    options = {"dtype": dtype or torch.float32, "use_safetensors": True}
    found: dict[str, Any] = {
        "transformer": DiCoTransformer.from_pretrained(folder / "transformer", low_cpu_mem_usage=False, **options),
        "scheduler": diffusers.DDPMScheduler.from_pretrained(folder / "scheduler"),
    }
    if index["vae"][0]:
        vae = getattr(diffusers, index["vae"][1])
        found["vae"] = vae.from_pretrained(folder / "vae", low_cpu_mem_usage=False, **options)
    if index["text_encoder"][0]:
        tower = getattr(transformers, index["text_encoder"][1])
        found["text_encoder"] = tower.from_pretrained(folder / "text_encoder", **options)
        found["tokenizer"] = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    settings = {key: value for key, value in index.items() if not isinstance(value, list) and key[0] != "_"}
    return DiCoPipeline(**{**absent, **found, **settings, **parts})
