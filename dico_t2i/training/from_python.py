"""Training that a script or a notebook calls, as often as it likes."""

import atexit
from pathlib import Path

from dico_t2i.config import Config
from dico_t2i.training.ranks.distributed import leave_world
from dico_t2i.training.ranks.signals import handlers_restored
from dico_t2i.training.trainer import train as train_run


def train(config: Config, runs: str | Path = "runs") -> Path:
    """Train the run of a config, or resume it where it stopped. Returns the run's folder.

    runs: the folder of the run folders. Under torchrun or SLURM every rank calls this, as with ``dico train``. Raises
    SystemExit with code 75 if a signal, such as an interrupt of the notebook, stopped the run after a save; the same
    call resumes it. Raises ValueError that says what to correct (ConfigError, DataError, MissingModelError,
    CheckpointError), before training starts if possible.
    """
    with handlers_restored():
        code = train_run(config, Path(runs))
    atexit.unregister(leave_world)
    atexit.register(leave_world)  # not now, as the process group serves the next call as well
    if code:
        raise SystemExit(code)
    return Path(runs) / config.name
