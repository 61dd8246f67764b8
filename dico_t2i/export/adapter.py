"""Writes an adapter as a file of its own, or adds one to weights and writes the result as an exported folder."""

from pathlib import Path

from dico_t2i.config import load_config
from dico_t2i.encoders.identity import KEY
from dico_t2i.encoders.local import file_hash
from dico_t2i.export.folder import check_encoders, check_new, write_folder
from dico_t2i.models import adapter_origin, merge_adapter, read_adapter, write_adapter
from dico_t2i.runs.checkpoint import read_weights
from dico_t2i.runs.lineage import KEY as LINEAGE
from dico_t2i.runs.lineage import ancestor
from dico_t2i.runs.weights import chosen_weights, exported_weights, locate_checkpoint, trained_config
from dico_t2i.sampling.trained import find_trained


def is_adapter(path: Path) -> bool:
    """Whether a run or checkpoint trains an adapter."""
    if exported_weights(path) is not None:
        return False
    return load_config(locate_checkpoint(path)[0] / "config.yaml").adapter is not None


def export_adapter(path: Path, weights: str | None, out: Path) -> None:
    """Write the adapter of a run or checkpoint to the new file ``out``; see ``models.adapter`` for its keys.

    weights: "weight" or an average such as "ema_0.9999"; None stands for the config's first average. Raises ValueError
    if the run trains no adapter, or if ``out`` exists; CheckpointError if the checkpoint is damaged.
    """
    check_new(out)
    run, checkpoint = locate_checkpoint(path)
    config = trained_config(run, checkpoint)
    if config.adapter is None:
        raise ValueError(f"{path}: it trains all weights and no adapter; give --out a folder, not {out.name}")
    kind = chosen_weights(weights, config, checkpoint)
    tensors = dict(read_weights(checkpoint, kind))
    lineage = checkpoint.state[LINEAGE]
    origin = {"run": config.name, "step": checkpoint.step, "weights": kind, LINEAGE: lineage}
    write_adapter(out, tensors, config.adapter, origin)


def export_merged(
    path: Path, weights: str | None, out: Path, encoders: bool = True, adapter: Path | None = None, scale: float = 1.0
) -> None:
    """Write the new folder ``out`` with an adapter added to the weights, which are all in memory meanwhile.

    path: the weights that the file ``adapter`` is added to, of any kind; without a file, a run that trains an adapter,
    or one of its checkpoints. Raises ValueError like ``export.folder.export``, and if the adapter does not fit.
    """
    check_new(out)
    source = find_trained(path, weights)
    check_encoders(source.config, encoders)
    state, lineage = source.read(), list(source.record.get(LINEAGE, ()))
    if source.config.adapter:
        lineage.append(ancestor("adapter", str(source.path), source.hash(), source.step))
    if adapter:
        merge_adapter(state, read_adapter(adapter), scale)
        lineage.append(ancestor("adapter", adapter.name, file_hash(adapter), adapter_origin(adapter).get("step")))
    origin = {"run": source.config.name, "step": source.step, "weights": source.kind, LINEAGE: lineage}
    whole = source.config.model_copy(update={"adapter": None, "init": None})
    shapes = {name: parameter.shape for name, parameter in state.items()}
    arrays = (parameter.numpy() for parameter in state.values())
    write_folder(out, whole, shapes, arrays, origin, {}, encoders, trained=source.record.get(KEY))
