"""Samples images of many prompts or labels into a folder. Each batch is written at once, and a second start resumes.

out/
  00000.png ...   images in the order of the prompts, with prompt and seed as metadata
  sample.json     settings of the images; the same command makes missing images, and a different one is refused
  grid.png        the first images with their prompts, written last
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from dico_t2i.config import SamplerConfig
from dico_t2i.encoders.local import file_hash
from dico_t2i.files import write_atomically
from dico_t2i.ops.backend import OPERATORS
from dico_t2i.randomness import check_seeds
from dico_t2i.runs.folder import MANIFEST
from dico_t2i.runs.weights import exported_weights, locate_checkpoint
from dico_t2i.sampling.images import image_path, save_grid, save_image
from dico_t2i.sampling.labels import class_number, conditions_of
from dico_t2i.sampling.options import Options, changed_sampler
from dico_t2i.sampling.pipeline import Pipeline, choose_device, load_pipeline
from dico_t2i.text_lines import check_text, read_lines

_RECORD = "sample.json"
_OPTIONS = ("negative_prompt", "height", "width", "init_image", "strength", "mask")


def run(arguments: argparse.Namespace) -> int:
    """Run `dico sample`. Raises ValueError or OSError that says what to correct, if possible before loading."""
    conditions = [c for c in _conditions(arguments) for _ in range(arguments.per_prompt)]
    seeds = check_seeds(range(arguments.seed, arguments.seed + len(conditions)))
    options = _options(arguments)
    device, dtype = choose_device(arguments.dtype)
    record = {**_record(arguments, conditions, dtype), **_adapter(arguments)}
    missing = _missing(arguments.out, record, len(conditions))
    if arguments.exact:
        os.environ[OPERATORS] = "torch"
    adapter = arguments.adapter, arguments.adapter_scale
    pipeline = load_pipeline(arguments.checkpoint, arguments.weights, device, dtype, *adapter)
    _check_conditions(arguments, pipeline)
    sampler = chosen_sampler(arguments, pipeline.config.sampler)
    pipeline.check(options, sampler)
    encoder = pipeline.conditioner.text_encoder
    if encoder is not None and encoder.seeded:
        print(f"text encoder: {encoder.description}", file=sys.stderr)
    if len(missing) < len(conditions):
        there = len(conditions) - len(missing)
        print(f"{arguments.out} already has {there} of {len(conditions)} images", file=sys.stderr)
    for batch, images in _batches(pipeline, arguments, conditions, seeds, sampler, options, missing):
        _begin(arguments.out, {**record, "sampler": sampler.model_dump(mode="json")})
        for index, image in zip(batch, images, strict=True):
            if index in missing:
                save_image(image, str(conditions[index]), seeds[index], image_path(arguments.out, index))
    save_grid([image_path(arguments.out, number) for number in range(len(conditions))], arguments.out)
    print(f"{len(conditions)} images and grid.png in {arguments.out}")
    return 0


def _batches(
    pipeline: Pipeline,
    arguments: argparse.Namespace,
    conditions: Sequence[str | int],
    seeds: Sequence[int],
    sampler: SamplerConfig,
    options: Options,
    missing: set[int],
) -> Iterator[tuple[range, Tensor]]:
    """Yield the numbers and images of each batch with missing images.

    Batches are sampled completely, as the last bits of an image may depend on its batch.
    """
    batches = [range(i, min(i + arguments.batch, len(seeds))) for i in range(0, len(seeds), arguments.batch)]
    batches = [batch for batch in batches if missing.intersection(batch)]
    with Progress(transient=True) as progress:
        task = progress.add_task(f"sampling {len(missing)} images", total=None)
        for number, batch in enumerate(batches):

            def report(done: int, steps: int, number: int = number) -> None:
                progress.update(task, completed=number * steps + done, total=len(batches) * steps)

            part = slice(batch.start, batch.stop)
            decode_batch = arguments.decode_batch
            yield (
                batch,
                pipeline.generate(conditions[part], seeds[part], sampler, len(batch), report, decode_batch, options),
            )


def _record(arguments: argparse.Namespace, conditions: Sequence[str | int], dtype: torch.dtype) -> dict[str, Any]:
    """The settings that the images depend on, as far as they are known before the model is loaded."""
    return {
        **_weights_identity(arguments.checkpoint),
        "weights": arguments.weights,
        "asked": {key: getattr(arguments, key) for key in ("sampler", "steps", "guidance", "fast", "exact")},
        "dtype": str(dtype).removeprefix("torch."),
        "images": len(conditions),
        "first seed": arguments.seed,
        "prompts": hashlib.sha256(json.dumps(conditions).encode()).hexdigest()[:16],
        "options": _given_options(arguments),
    }


def _adapter(arguments: argparse.Namespace) -> dict[str, Any]:
    """The identity and the scale of the adapter, or None. Raises ValueError if there is no such file."""
    if arguments.adapter is None:
        return {"adapter": None}
    if not arguments.adapter.is_file():
        raise ValueError(f"--adapter {arguments.adapter}: there is no such file")
    return {"adapter": f"{file_hash(arguments.adapter)[:16]}, scale {arguments.adapter_scale:g}"}


def _options(arguments: argparse.Namespace) -> Options:
    """The options that images depend on. Raises ValueError if they do not go together, or if a file is not an image."""
    if arguments.negative_prompt is not None:
        check_text(arguments.negative_prompt, "--negative-prompt")
    return Options(
        arguments.negative_prompt,
        arguments.height,
        arguments.width,
        _read_image(arguments.init_image, "--init-image"),
        arguments.strength,
        _read_image(arguments.mask, "--mask"),
    )


def _read_image(path: Path | None, option: str) -> Image.Image | None:
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{option} {path}: cannot be read as an image: {error}") from None


def _given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options in ``_OPTIONS`` that were given; of a file the hash of its content."""
    given = {key: getattr(arguments, key) for key in _OPTIONS if getattr(arguments, key) is not None}
    return {key: file_hash(value)[:16] if isinstance(value, Path) else value for key, value in given.items()}


def _weights_identity(path: Path) -> dict[str, str]:
    """The identity of the weights. Raises ValueError if there is neither a checkpoint nor an export."""
    exported = exported_weights(path)
    if exported is not None:
        content = hashlib.sha256((path / "export.json").read_bytes()).hexdigest()[:16]
        return {"checkpoint": path.name, "content": f"{content}, {exported.stat().st_size} bytes"}
    _, checkpoint = locate_checkpoint(path)
    content = hashlib.sha256((checkpoint.path / MANIFEST).read_bytes()).hexdigest()[:16]
    return {"checkpoint": checkpoint.path.name, "content": content}


def _missing(out: Path, record: Mapping[str, Any], count: int) -> set[int]:
    """The numbers of the images that are missing in the folder. Raises ValueError if it holds something else."""
    out.mkdir(parents=True, exist_ok=True)  # now, so that an error does not come after sampling
    there = [path for path in out.iterdir() if not path.name.endswith(".part")]  # left by a killed process
    if not there:
        return set(range(count))
    try:
        before = json.loads((out / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict):
        raise ValueError(f"--out {out}: it is not empty, and nothing is overwritten; give a new folder")
    before.setdefault("options", {})  # which older records lack
    other = [key for key, value in record.items() if before.get(key) != value]
    if other:
        raise ValueError(
            f"--out {out}: it holds images of a different command ({', '.join(other)} differ, see {_RECORD}), and"
            " nothing is overwritten; give a new folder"
        )
    return {number for number in range(count) if not image_path(out, number).exists()}


def _begin(out: Path, record: Mapping[str, Any]) -> None:
    if not (out / _RECORD).exists():
        write_atomically(out / _RECORD, (json.dumps(record, indent=1) + "\n").encode())


def _conditions(arguments: argparse.Namespace) -> list[str | int]:
    """The prompts or class numbers of the arguments. Raises ValueError if they cannot be read."""
    if arguments.labels is not None:
        return [class_number(check_text(label, "--labels")) for label in arguments.labels]
    if arguments.prompt:
        return [check_text(prompt, f"--prompt {number}") for number, prompt in enumerate(arguments.prompt, 1)]
    if not arguments.prompts.is_file():
        raise ValueError(f"--prompts {arguments.prompts}: there is no such file")
    try:
        lines = read_lines(arguments.prompts)
    except ValueError as error:
        raise ValueError(f"--prompts {error}") from None
    prompts: list[str | int] = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {arguments.prompts}: the file has no prompts")
    return prompts


def _check_conditions(arguments: argparse.Namespace, pipeline: Pipeline) -> None:
    """Raise ValueError if the model does not take these conditions, text or classes, or for unknown classes."""
    model, labels = pipeline.config.model, arguments.labels
    if model.condition != ("text" if labels is None else "class"):
        raise ValueError(f"{arguments.checkpoint} is {model.condition}-conditional; use --labels only for classes")
    if labels is None:
        return
    try:
        conditions_of(labels, model)
    except ValueError as error:
        raise ValueError(f"--labels {error}") from None


def chosen_sampler(arguments: argparse.Namespace, default: SamplerConfig) -> SamplerConfig:
    """The config's sampler, changed by --fast and then by the other options."""
    fast = {"kind": "dpm++", "steps": 20} if arguments.fast else {}
    asked = {"kind": arguments.sampler, "steps": arguments.steps, "guidance": arguments.guidance}
    return changed_sampler(default, {**fast, **{key: value for key, value in asked.items() if value is not None}})
