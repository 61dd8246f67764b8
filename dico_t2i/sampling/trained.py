"""Finds trained weights on disk: those of a run, of one of its checkpoints, or of an exported folder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from dico_t2i.config import Config, ConfigError, InitConfig, load_config
from dico_t2i.encoders.local import file_hash, find_weights, read_json
from dico_t2i.models import Network, merge_adapter
from dico_t2i.runs.checkpoint import Checkpoint, read_weights
from dico_t2i.runs.kinds import WEIGHT
from dico_t2i.runs.lineage import KEY as LINEAGE
from dico_t2i.runs.lineage import Ancestor, Lineage, ancestor, descended
from dico_t2i.runs.weights import chosen_weights, exported_weights, locate_checkpoint, trained_config

RAW = "raw"  # what init.weights calls the weights themselves


@dataclass(frozen=True)
class Trained:
    """The weights of a whole network.

    name: their place and kind. config: that of their run; in an export, the encoders are those of the folder. record:
    the state in the checkpoint's manifest, or the content of export.json. kind: which weights, such as "ema_0.9999".
    read: reads the parameters, in fp32, by name. hash: the SHA-256 of the checkpoint's manifest, or of the exported
    weights.
    """

    path: Path
    name: str
    config: Config
    record: Mapping[str, Any]
    kind: str | None
    step: int | None
    read: Callable[[], dict[str, Tensor]]
    hash: Callable[[], str]

    def fill(self, model: Network) -> None:
        """Load the weights into a network. Raises ValueError if they do not fit, or are not finite."""
        state = self.read()
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"{self.path}: the weights do not fit the model of the config: {str(error).splitlines()[1]}"
            ) from None
        broken = next((name for name, values in state.items() if not values.isfinite().all()), None)
        if broken:
            raise ValueError(f"{self.path}: {broken} is not finite, so training diverged; use an earlier checkpoint")

    def lineage(self) -> Lineage:
        """The lineage of a run that starts from these weights."""
        return descended(self.record, ancestor("init", self.name, self.hash(), self.step))


def find_trained(path: Path, weights: str | None) -> Trained:
    """The weights in a run, a checkpoint or an exported folder; those of a run that trains an adapter include it.

    weights: "weight" or an average such as "ema_0.9999"; None stands for the first average. Raises ValueError that
    says what is missing.
    """
    file = exported_weights(path)
    if file is not None:
        return _export(path, file, weights)
    run, checkpoint = locate_checkpoint(path)
    config = trained_config(run, checkpoint)
    kind = chosen_weights(weights, config, checkpoint)

    def own() -> dict[str, Tensor]:
        return dict(read_weights(checkpoint, kind))

    read = _with_base(config, checkpoint, own) if config.adapter else own
    return Trained(
        checkpoint.path,
        f"{path} ({kind})",
        config,
        checkpoint.state,
        kind,
        checkpoint.step,
        read,
        lambda: checkpoint.sha256,
    )


def init_place(init: InitConfig) -> Path:
    """The run, checkpoint, exported folder or file of weights that ``init.from`` names. Raises MissingModelError."""
    files = find_weights(init.from_, "init.from")
    return files[0] if len(files) == 1 else files[0].parent


def is_weights_file(place: Path) -> bool:
    """Whether a path is a file of weights; ``checkpoints/latest`` is a file, too, but stands for a checkpoint."""
    return place.is_file() and place.parent.name != "checkpoints"


def init_kind(init: InitConfig) -> str | None:
    """The kind of weights that ``init.weights`` asks for, by its name in a checkpoint; None stands for the default."""
    return WEIGHT if init.weights == RAW else init.weights


def export_record(folder: Path) -> dict[str, Any]:
    """The content of export.json in an exported folder; empty without the file."""
    file = folder / "export.json"
    return read_json(file) if file.exists() else {}


def base_of(config: Config) -> Trained:
    """The weights that a run's adapter is added to. Raises ValueError if they cannot be found or read."""
    assert config.init is not None  # the config refuses an adapter without it
    place = init_place(config.init)
    if is_weights_file(place):
        raise ConfigError(
            f"init.from: {config.init.from_} is a file, but an adapter needs a run, a checkpoint or an exported folder;"
            " make one of released weights with dico import-official"
        )
    try:
        base = find_trained(place, init_kind(config.init))
    except ValueError as error:
        raise ConfigError(f"init.from: {error}") from None
    return replace(base, name=f"{config.init.from_} ({base.kind})")


def check_base(lineage: Lineage, base: Lineage, adapter: Path) -> None:
    """Raise ConfigError if ``base`` is not the lineage that the checkpoint ``adapter`` was trained with."""
    trained, found = lineage[-1], base[-1]
    if trained["sha256"] != found["sha256"]:
        raise ConfigError(
            f"init.from: {adapter} is an adapter of {_shown(trained)}, but this is {_shown(found)}, with other weights;"
            " set init.from to the checkpoint of the former"
        )


def _shown(base: Ancestor) -> str:
    step = "" if base["step"] is None else f", step {base['step']}"
    return f"{base['from']}{step}, SHA-256 {base['sha256'][:12]}"


def exported_config(folder: Path) -> Config:
    """The config of an exported folder, with the paths of the encoders in that folder."""
    config = load_config(folder / "config.yaml")
    vae, text = folder / "vae", folder / "text_encoder"
    changes: dict[str, Any] = {}
    if vae.is_dir():
        changes["autoencoder"] = config.autoencoder.model_copy(update={"path": str(vae)})
    if text.is_dir():
        own = {"model": str(text), "weights": "pretrained"}
        changes["text_encoder"] = config.text_encoder.model_copy(update=own)
    return config.model_copy(update=changes)


def _export(path: Path, file: Path, weights: str | None) -> Trained:
    record = export_record(path)
    held = record.get("weights")
    if weights not in (None, held):
        raise ValueError(f"--weights {weights}: {path} is an export that holds only {held}; give its run")
    config, step, name = exported_config(path), record.get("step"), f"{path} ({held})" if held else str(path)
    return Trained(path, name, config, record, held, step, lambda: load_file(file), lambda: file_hash(file))


def _with_base(
    config: Config, checkpoint: Checkpoint, adapter: Callable[[], dict[str, Tensor]]
) -> Callable[[], dict[str, Tensor]]:
    """Read the weights of the base, and add the adapter to them."""
    base = base_of(config)
    check_base(checkpoint.state[LINEAGE], base.lineage(), checkpoint.path)

    def read() -> dict[str, Tensor]:
        assert config.adapter is not None
        weights = base.read()
        merge_adapter(weights, adapter(), config.adapter.factor)
        return weights

    return read
