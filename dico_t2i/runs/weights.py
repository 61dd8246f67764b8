"""The kinds of weights that a run keeps, and where a path to a run leads."""

from pathlib import Path

from dico_t2i.config import Config
from dico_t2i.runs.checkpoint import Checkpoint, CheckpointError, newest_checkpoint, open_checkpoint
from dico_t2i.runs.kinds import MOMENTS, WEIGHT, ema_name

WEIGHTS_FILE = "model.safetensors"
TRANSFORMER_WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")  # what it is a link to


def exported_weights(path: Path) -> Path | None:
    """The file of weights of an exported folder, also of one that was copied without its link; None if it is no export.

    Raises ValueError for an export without weights.
    """
    if not (path / "export.json").exists() and not (path / WEIGHTS_FILE).exists():
        return None
    found = next((file for file in (path / WEIGHTS_FILE, path / TRANSFORMER_WEIGHTS) if file.is_file()), None)
    if found is None:
        raise ValueError(f"{path}: an exported folder without its weights ({TRANSFORMER_WEIGHTS}); copy it again")
    return found


def locate_checkpoint(path: Path) -> tuple[Path, Checkpoint]:
    """The run folder and the checkpoint that a path stands for: itself, or the newest complete one of a run."""
    if not path.exists():
        raise ValueError(f"{path}: no such run or exported folder")
    is_checkpoint = path.parent.name == "checkpoints"
    if is_checkpoint and path.is_file():  # latest, which holds a name
        path = path.with_name(path.read_text().strip())
    run = path.parent.parent if is_checkpoint else path
    if not (run / "config.yaml").exists():
        raise ValueError(f"{path}: neither a run (config.yaml, checkpoints/) nor an exported folder ({WEIGHTS_FILE})")
    return run, open_checkpoint(path) if is_checkpoint else newest_checkpoint(run / "checkpoints")


def default_weights(config: Config) -> str:
    """The first average of the weights, or the weights themselves where none is kept."""
    return ema_name(config.optimizer.ema[0]) if config.optimizer.ema else WEIGHT


def chosen_weights(weights: str | None, config: Config, checkpoint: Checkpoint) -> str:
    """The kind that is asked for, or the default. Raises CheckpointError for one that is no weights or is not there."""
    kind = weights or default_weights(config)
    usable = [name for name in checkpoint.kinds if name not in MOMENTS]
    if kind not in usable:
        raise CheckpointError(f"{checkpoint.path}: no {kind}; it holds {', '.join(usable)}")
    return kind
