"""One folder with a model's weights and config, for sampling and for others to use."""

import json
from pathlib import Path

from dico_t2i.config import dump_config, load_config
from dico_t2i.safetensors_writer import write_safetensors
from dico_t2i.sampling import WEIGHTS_FILE, default_weights, locate_checkpoint
from dico_t2i.training.checkpoint import read_weights, verify


def export(path: Path, weights: str | None, out: Path) -> None:
    """Write config.yaml, model.safetensors (fp32, whole parameters) and export.json to a new folder.

    One parameter is in memory at a time.
    weights: "weight" or an average such as "ema_0.9999"; None is the config's first average.
    Raises ValueError when ``out`` is there already, CheckpointError when the checkpoint is not whole.
    """
    if out.exists():
        raise ValueError(f"--out {out}: exists; nothing is overwritten, give a new folder")
    run, checkpoint = locate_checkpoint(path)
    config = load_config(run / "config.yaml")
    kind = weights or default_weights(config)
    parameters = read_weights(checkpoint, kind)
    verify(checkpoint)
    temporary = out.with_name(f".{out.name}.partial")
    temporary.mkdir(parents=True, exist_ok=True)
    arrays = (parameter.numpy() for _, parameter in parameters)
    write_safetensors(temporary / WEIGHTS_FILE, checkpoint.shapes, arrays)
    (temporary / "config.yaml").write_text(dump_config(config))
    origin = {"run": config.name, "step": checkpoint.step, "images": checkpoint.position, "weights": kind}
    (temporary / "export.json").write_text(json.dumps(origin, indent=2) + "\n")
    temporary.rename(out)
