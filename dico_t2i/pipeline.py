"""The exported pipeline, run with this package's own network and samplers; importing this module takes no time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from dico_t2i.export.portable.pipeline import DiCoPipeline as PortablePipeline


class DiCoPipeline:
    """What `dico export` wrote, run by this package; the code in the folder is not executed."""

    @staticmethod
    def from_pretrained(folder: str | Path, dtype: torch.dtype | None = None, **parts: Any) -> PortablePipeline:
        """The pipeline of an exported folder; a diffusers pipeline.

        dtype: of all models; float32 if left out. parts: components to take instead of the folder's: vae,
        text_encoder, tokenizer. Raises ValueError if the folder is not an export.
        """
        from dico_t2i.export.portable.load import load_portable

        return load_portable(Path(folder), dtype, parts)
