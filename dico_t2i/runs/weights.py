"""Finds the checkpoint and the kind of weights for a path to a run, a checkpoint or an export."""

from pathlib import Path

from dico_t2i.config import Config, ConfigError, load_config
from dico_t2i.runs.checkpoint import Checkpoint, CheckpointError, newest_checkpoint, open_checkpoint
from dico_t2i.runs.folder import STAGE
from dico_t2i.runs.kinds import MOMENTS, WEIGHT, ema_name

WEIGHTS_FILE = "model.safetensors"
TRANSFORMER_WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")  # WEIGHTS_FILE is a link to it


def exported_weights(path: Path) -> Path | None:
    """The weights file of an exported folder, even if it was copied without its link; None if it is not an export.

    Raises ValueError for an export without weights.
    """
    if not (path / "export.json").exists() and not (path / WEIGHTS_FILE).exists():
        return None
    found = next((file for file in (path / WEIGHTS_FILE, path / TRANSFORMER_WEIGHTS) if file.is_file()), None)
    if found is None:
        raise ValueError(f"{path}: this exported folder lacks its weights ({TRANSFORMER_WEIGHTS}); copy it again")
    return found


def locate_checkpoint(path: Path) -> tuple[Path, Checkpoint]:
    """The run folder and the checkpoint of a path to a checkpoint, or to a run (its newest complete checkpoint)."""
    if not path.exists():
        raise ValueError(f"{path}: no such run or exported folder")
    is_checkpoint = path.parent.name == "checkpoints"
    if is_checkpoint and path.is_file():  # the file latest, which contains a name
        path = path.with_name(path.read_text().strip())
    run = path.parent.parent if is_checkpoint else path
    if not (run / "config.yaml").exists():
        raise ValueError(f"{path}: neither a run (config.yaml, checkpoints/) nor an exported folder ({WEIGHTS_FILE})")
    return run, open_checkpoint(path) if is_checkpoint else newest_checkpoint(run / "checkpoints")


def trained_config(run: Path, checkpoint: Checkpoint) -> Config:
    """The config with which a checkpoint was trained: that of its stage, if the run has stages.

    Raises ConfigError if the run's config does not have this stage.
    """
    config, record = load_config(run / "config.yaml"), checkpoint.state.get(STAGE)
    if not record:
        return config.stage_configs[0]
    for stage, own in zip(config.stages, config.stage_configs, strict=True):
        if stage.name == record["name"]:
            return own
    raise ConfigError(f"{checkpoint.path}: is of stage {record['name']}, which {run / 'config.yaml'} does not have")


def default_weights(config: Config) -> str:
    """The first average of the weights, or the weights themselves if the run keeps no average."""
    return ema_name(config.optimizer.ema[0]) if config.optimizer.ema else WEIGHT


def chosen_weights(weights: str | None, config: Config, checkpoint: Checkpoint) -> str:
    """The given kind of weights, or the default. Raises CheckpointError if the checkpoint has no such weights."""
    kind = weights or default_weights(config)
    usable = [name for name in checkpoint.kinds if name not in MOMENTS]
    if kind not in usable:
        raise CheckpointError(f"{checkpoint.path}: no {kind}; it holds {', '.join(usable)}")
    return kind
