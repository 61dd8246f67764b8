"""Prolongs runs whose learning rate falls at the end (schedule: wsd).

A checkpoint records the step at which the rate of its run begins to fall. When the run is started again with a longer
duration, the checkpoints from after that step are set aside: they are a finished model, but no part of the longer run,
which continues from the last checkpoint with the full rate.
"""

from pathlib import Path

import torch.distributed as dist

from dico_t2i.config.stages import RunStage
from dico_t2i.files import write_atomically
from dico_t2i.runs.checkpoint import LATEST, Checkpoint, CheckpointError, checkpoint_folders, open_checkpoint
from dico_t2i.runs.folder import STAGE
from dico_t2i.training.ranks.distributed import World

KEY = "decay_from"  # the key of that step in checkpoints
ASIDE = "decayed-{:08d}"  # the folder of a checkpoint of this step that is set aside, which no resume considers


def prolong(folder: Path, last: RunStage, world: World) -> str:
    """Set checkpoints aside if the rate of the last stage now begins to fall at a later step; collective.

    Returns what was done; empty for nothing.
    """
    message = _prolong(folder, last) if world.is_main and last.decay else ""
    dist.barrier()
    return message


def _prolong(folder: Path, last: RunStage) -> str:
    complete = list(filter(None, map(_opened, checkpoint_folders(folder))))
    fallen = [found for found in complete if _has_fallen(found, last)]
    usable = [found for found in complete if found not in fallen]
    if not fallen:
        return ""
    if not usable:
        return (
            f"WARNING: the learning rate had begun to fall at step {fallen[-1].state[KEY]}, and there is no checkpoint"
            f" from before; the run continues from {fallen[-1].path} with the full rate"
        )
    write_atomically(folder / LATEST, usable[-1].path.name.encode())
    for found in fallen:
        found.path.rename(folder / ASIDE.format(found.step))
    return (
        f"the run is prolonged from {usable[-1].path.name}, the last checkpoint with the full learning rate;"
        f" the later ones are now {', '.join(ASIDE.format(found.step) for found in fallen)}"
    )


def _has_fallen(found: Checkpoint, last: RunStage) -> bool:
    """Whether a checkpoint of the last stage was trained with a falling rate, where the rate is now constant."""
    record = found.state.get(STAGE, {})
    if record.get("name", "") != last.name:
        return False
    now = last.at(record.get("first_step", 0), 0).decay_from
    return now is not None and found.state.get(KEY, found.step) < min(found.step, now)


def _opened(path: Path) -> Checkpoint | None:
    try:
        return open_checkpoint(path)
    except CheckpointError:
        return None
