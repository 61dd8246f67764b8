"""Records where a run's weights come from: what it was started from, its stages and its adapters, with hashes.

The record is a list in the order of time. A checkpoint's manifest and an export's export.json hold it under ``KEY``. A
run that starts from other weights first takes over the record of their source (``descended``), so that the list goes
back to the first training.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from dico_t2i.runs.folder import MANIFEST

KEY = "lineage"

What = Literal["init", "stage", "adapter"]
# from: the name of the run, export, file, hub id or URL; of a stage, its name.
# sha256: of an init or adapter, that of its weights (of a checkpoint, that of its manifest); of a stage, its config's.
# step: of an init or adapter, how many steps it was trained for, or None if that is not known; of a stage, the run's
# step at which it began.
Ancestor = TypedDict("Ancestor", {"what": What, "from": str, "sha256": str, "step": int | None})
Lineage = list[Ancestor]


def ancestor(what: What, source: str, sha256: str, step: int | None) -> Ancestor:
    """One entry of a record; the comment at ``Ancestor`` says what its values are."""
    return {"what": what, "from": source, "sha256": sha256, "step": step}


def descended(source: Mapping[str, Any], last: Ancestor) -> Lineage:
    """The record of weights that come from a source. source: a checkpoint's state, or the content of export.json."""
    return [*source.get(KEY, ()), last]


def with_stage(lineage: Lineage, stage: Ancestor) -> Lineage:
    """The record with this stage at its end; unchanged if the stage has begun already, as after a resume."""
    return lineage if stage in lineage else [*lineage, stage]


def read_lineage(run: Path) -> Lineage:
    """The record in a run's newest complete checkpoint; empty if there is none or it cannot be read."""
    manifests = sorted((run / "checkpoints").glob(f"step-*/{MANIFEST}"))
    try:
        return list(json.loads(manifests[-1].read_text(encoding="utf-8")).get(KEY, ()))
    except (IndexError, OSError, ValueError, AttributeError):
        return []


def lineage_table(lineage: Lineage) -> list[list[str]]:
    """A row for each entry: what, from, step, and the first 12 characters of the hash."""
    return [
        [entry["what"], entry["from"], "" if entry["step"] is None else f"{entry['step']:,}", entry["sha256"][:12]]
        for entry in lineage
    ]
