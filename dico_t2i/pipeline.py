"""Runs an exported pipeline with this package's own network and samplers. Importing this module is fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from dico_t2i.export.portable.pipeline import DiCoPipeline as PortablePipeline


class DiCoPipeline:
    """The pipeline in a folder that `dico export` wrote, run by this package; code in the folder is not executed."""

    @staticmethod
    def from_pretrained(folder: str | Path, dtype: torch.dtype | None = None, **parts: Any) -> PortablePipeline:
        """The pipeline of an exported folder, which is a pipeline of diffusers.

        dtype: the dtype of all models; float32 by default. parts: components to use instead of the folder's: vae,
        text_encoder, tokenizer. Raises ValueError if the folder is not an export.
        """
        from dico_t2i.export.portable.load import load_portable

        return load_portable(Path(folder), dtype, parts)
