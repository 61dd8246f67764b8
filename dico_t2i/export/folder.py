"""Writes a folder with a model's weights, config and code, for sampling with this package and with diffusers.

config.yaml, model.safetensors    the files that `dico sample` reads
export.json, README.md            the origin of the weights; the model card
model_index.json, pipeline.py     the diffusers pipeline, as code that does not need this package
transformer/                      config.json, model.py, and the weights themselves
scheduler/ vae/ text_encoder/ tokenizer/

For a peer (models/peers) there are no pipeline, transformer/ and scheduler/; only `dico sample` reads the folder.
"""

import importlib.metadata
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dico_t2i.config import Config, DiCoConfig, dump_config
from dico_t2i.encoders import ChainAutoencoder, DiffusersAutoencoder, load_autoencoder
from dico_t2i.encoders.identity import KEY, Identities, check_identities, identities
from dico_t2i.encoders.text import TextEncoder, load_text_encoder
from dico_t2i.export.card import model_card, one_clip
from dico_t2i.export.inline import standalone
from dico_t2i.runs.checkpoint import read_weights
from dico_t2i.runs.evaluations import read_evaluations
from dico_t2i.runs.lineage import KEY as LINEAGE
from dico_t2i.runs.log import last_report
from dico_t2i.runs.safetensors_writer import write_safetensors
from dico_t2i.runs.weights import (
    TRANSFORMER_WEIGHTS,
    WEIGHTS_FILE,
    chosen_weights,
    exported_weights,
    locate_checkpoint,
    trained_config,
)
from dico_t2i.sampling.labels import CLASSES, class_names
from dico_t2i.sampling.trained import exported_config

_SOURCE_NOTE = (
    "{what} of DiCo, as one file that needs only diffusers, transformers and torch.\n\n"
    "Copied by `dico export` from the modules of dico_t2i that are named below (Apache-2.0); edit those instead.\n"
)

Component = tuple[str, str] | tuple[None, None]  # library and class, as in model_index.json


def export(path: Path, weights: str | None, out: Path, encoders: bool = True) -> None:
    """Write the new folder ``out`` with weights in fp32, with one parameter in memory at a time.

    weights: "weight" or an average such as "ema_0.9999"; None stands for the config's first average. encoders: copy the
    autoencoder and the text encoder, except those of open_clip, which diffusers cannot read. Raises ValueError if
    ``out`` exists, or if encoders are to be copied and the text encoder is not a single CLIP; MissingModelError if an
    encoder cannot be found; CheckpointError if the checkpoint is damaged.
    """
    check_new(out)
    if exported_weights(path) is not None:
        raise ValueError(f"{path}: it is an exported folder already")
    run, checkpoint = locate_checkpoint(path)
    config = trained_config(run, checkpoint)
    check_encoders(config, encoders)
    kind = chosen_weights(weights, config, checkpoint)
    parameters = read_weights(checkpoint, kind)
    origin = {"run": config.name, "step": checkpoint.step, "images": checkpoint.position, "weights": kind}
    origin[LINEAGE] = checkpoint.state.get(LINEAGE, [])
    metrics = last_report(run / "metrics.jsonl", checkpoint.step)
    arrays = (parameter.numpy() for _, parameter in parameters)
    results = [
        result
        for result in read_evaluations(run)
        if result["step"] == checkpoint.step and result.get("weights", kind) == kind
    ]
    trained = checkpoint.state.get(KEY)
    write_folder(out, config, checkpoint.network_shapes, arrays, origin, metrics, encoders, results, trained)


def check_new(out: Path) -> None:
    """Raise ValueError if the folder exists."""
    if out.exists():
        raise ValueError(f"--out {out}: it exists, and nothing is overwritten; give a new folder")


def check_encoders(config: Config, encoders: bool) -> None:
    """Raise ValueError if encoders are to be copied that an exported pipeline cannot take."""
    if encoders and config.model.condition == "text" and not one_clip(config.text_encoder):
        raise ValueError(
            "text_encoder: an exported pipeline takes a single CLIP; export with --no-encoders, and sample the folder"
            " with dico sample, which loads the text encoders that its config.yaml names"
        )


def write_folder(
    out: Path,
    config: Config,
    shapes: Mapping[str, Sequence[int]],
    arrays: Iterable[np.ndarray],
    origin: Mapping[str, Any],
    metrics: Mapping[str, Any],
    encoders: bool = True,
    evaluations: Sequence[Mapping[str, Any]] = (),
    trained: Mapping[str, Any] | None = None,
) -> None:
    """Write the folder of a model whose fp32 parameters are ``arrays``, in the order of ``shapes``.

    It has a temporary name until it is complete. origin is written to export.json; metrics (the last reported numbers)
    and evaluations (results of evals/) appear in the model card. trained: the identities of the encoders of training;
    export.json records them or, if they are not known, those of the copies.
    """
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    parts: dict[str, Component] = dict.fromkeys(("vae", "text_encoder", "tokenizer"), (None, None))
    (temporary / "config.yaml").write_text(dump_config(config))
    if encoders:
        added, trained = _save_encoders(config, temporary, trained or {})
        parts |= added
    _write_json(temporary / "export.json", {**origin, **({} if trained is None else {KEY: trained})})
    if isinstance(config.model, DiCoConfig):
        (temporary / "transformer").mkdir()
        write_safetensors(temporary / TRANSFORMER_WEIGHTS, shapes, arrays)
        (temporary / WEIGHTS_FILE).symlink_to(TRANSFORMER_WEIGHTS)  # the same parameters
        _write_pipeline(temporary, config, parts)
    else:
        write_safetensors(temporary / WEIGHTS_FILE, shapes, arrays)
    inside = [name for name, part in parts.items() if part[0]]
    (temporary / "README.md").write_text(model_card(config, origin, metrics, inside, evaluations))
    temporary.rename(out)


def _save_encoders(config: Config, folder: Path, trained: Mapping[str, Any]) -> tuple[dict[str, Component], Identities]:
    """Copy the encoders, and return them as components, with the identities of the copies.

    Raises ConfigError if they differ from those of training.
    """
    parts: dict[str, Component] = {}
    autoencoder, text = load_autoencoder(config.autoencoder, "cpu"), _exported_text_encoder(config)
    check_identities(trained, identities(autoencoder, text), config.name)
    if isinstance(autoencoder, ChainAutoencoder):
        raise ValueError(
            "autoencoder: diffusers has no class for TAESD's own files; export with --no-encoders, and sample the"
            " folder with dico sample"
        )
    if isinstance(autoencoder, DiffusersAutoencoder):
        autoencoder.save(folder / "vae")
        parts["vae"] = ("diffusers", autoencoder.class_name)
    if text is not None:
        parts["text_encoder"] = ("transformers", text.save(folder / "text_encoder", folder / "tokenizer"))
        parts["tokenizer"] = ("transformers", "CLIPTokenizer")
    _open_to_others(folder)
    copied = exported_config(folder)
    copies = identities(load_autoencoder(copied.autoencoder, "cpu"), _exported_text_encoder(copied))
    return parts, {**trained, **copies}


def _exported_text_encoder(config: Config) -> TextEncoder | None:
    """The text encoder to copy, or None."""
    goes = config.model.condition == "text" and config.text_encoder.kind != "open_clip"
    return load_text_encoder(config.text_encoder, "cpu") if goes else None


def _open_to_others(folder: Path) -> None:
    """Give all files the permissions of the user's umask, since safetensors makes its files private."""
    mode = (folder / "config.yaml").stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _write_pipeline(folder: Path, config: Config, parts: Mapping[str, Component]) -> None:
    """Write the code and configs of the pipeline, the network and the scheduler."""
    version = {"_diffusers_version": importlib.metadata.version("diffusers")}
    index = {
        "_class_name": ["pipeline", "DiCoPipeline"],
        **version,
        "transformer": ["model", "DiCoTransformer"],
        "scheduler": ["diffusers", _scheduler(config)["_class_name"]],
        **parts,
        "diffusion": config.diffusion.model_dump(),
        "sampler": config.sampler.model_dump(),
        "image_size": config.data.image_size,
        "downscale": config.downscale,
        **_latent_scale(config),
    }
    if config.model.condition == "class" and config.model.num_classes == CLASSES:
        index["id2label"] = {str(number): name for number, name in enumerate(class_names())}
    network = {"_class_name": "DiCoTransformer", **version, "network": config.model.model_dump()}
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "transformer" / "config.json", network)
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", {**version, **_scheduler(config)})
    for file, what, name in (
        ("pipeline.py", "The pipeline", "pipeline.DiCoPipeline"),
        ("transformer/model.py", "The network", "transformer.DiCoTransformer"),
    ):
        (folder / file).write_text(standalone([f"dico_t2i.export.portable.{name}"], _SOURCE_NOTE.format(what=what)))


def _latent_scale(config: Config) -> dict[str, Any]:
    """The factor of the latents or, if channels differ, the mean and the factor of each."""
    scale, mean, channels = config.autoencoder.scale, config.autoencoder.mean, config.model.in_channels
    if isinstance(scale, float) and mean is None:
        return {"latent_scale": scale}
    each = [scale] * channels if isinstance(scale, float) else list(scale)
    return {"latent_channels": {"mean": list(mean or [0.0] * channels), "scale": each}}


def _scheduler(config: Config) -> dict[str, Any]:
    """The config of a diffusers scheduler with the same noise schedule and learned variance, and without clipping."""
    steps = config.diffusion.steps
    if config.diffusion.kind == "flow":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": steps}
    betas: dict[str, dict[str, Any]] = {
        "linear": {"beta_schedule": "linear", "beta_start": 0.1 / steps, "beta_end": 20 / steps},
        "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    }
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": steps,
        **betas[config.diffusion.schedule],
        "variance_type": "learned_range" if config.model.learn_sigma else "fixed_large",
        "prediction_type": {"epsilon": "epsilon", "x0": "sample"}[config.diffusion.prediction],
        "clip_sample": False,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
