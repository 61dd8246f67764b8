"""The pipeline of diffusers with this package's own network and samplers."""

from pathlib import Path
from typing import Any, Self

import diffusers
import torch
import transformers

from dico_t2i.export.portable import pipeline as portable
from dico_t2i.export.portable.transformer import DiCoTransformer


class DiCoPipeline(portable.DiCoPipeline):
    """What `dico export` wrote, run by this package; the code in the folder is not executed."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32, **parts: Any) -> Self:
        """From an exported folder. parts: components to take instead of the folder's: vae, text_encoder, tokenizer.

        Raises ValueError if the folder is not an export.
        """
        folder = Path(folder)
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{folder}: not a folder of dico export (no model_index.json)")
        index = cls.load_config(folder)
        options = {"dtype": dtype, "use_safetensors": True}
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
        return cls(**{**absent, **found, **settings, **parts})
