"""From weights and prompts to images."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_map

from dico_t2i import randomness
from dico_t2i.config import Config, ConfigError, SamplerConfig, load_config
from dico_t2i.diffusion import ModelFn, guided, sample
from dico_t2i.encoders import Autoencoder, load_autoencoder, load_text_encoder
from dico_t2i.encoders.conditioner import Conditioner, find_fitting_text_encoder
from dico_t2i.encoders.local import read_json
from dico_t2i.memory import keep_freed_memory
from dico_t2i.models import Network, build_network
from dico_t2i.training.checkpoint import Checkpoint, CheckpointError, newest_checkpoint, open_checkpoint, read_weights
from dico_t2i.training.optimizer import MOMENTS, WEIGHT, ema_name

Progress = Callable[[int, int], None]
WEIGHTS_FILE = "model.safetensors"


@dataclass
class Pipeline:
    """Everything that turns prompts or labels into images."""

    config: Config
    model: Network
    autoencoder: Autoencoder
    conditioner: Conditioner
    device: torch.device

    @torch.no_grad()
    def generate(
        self,
        conditions: Sequence[str | int],
        seeds: Sequence[int],
        sampler: SamplerConfig,
        batch: int = 16,
        progress: Progress | None = None,
        decode_batch: int = 16,
    ) -> Tensor:
        """Images (N, 3, H, W) uint8 on the host, one for each prompt or label and its seed.

        An image's noise depends on its own seed only, whatever the batch. ``progress(done, total)`` counts steps
        over all batches. decode_batch: images that go through the autoencoder at a time, whose memory it bounds.
        """
        chunks = [slice(i, i + batch) for i in range(0, len(seeds), batch)]
        null = self._prepared(self.conditioner.null(1)) if sampler.guidance != 1 else {}
        images = []
        for number, chunk in enumerate(chunks):

            def report(done: int, steps: int, number: int = number) -> None:
                if progress:
                    progress(number * steps + done, len(chunks) * steps)

            latents = self._latents(self._conditioning(conditions[chunk]), null, seeds[chunk], sampler, report)
            images += [self.autoencoder.decode(part).cpu() for part in latents.split(decode_batch)]
        return torch.cat(images)

    def _latents(
        self,
        cond: dict[str, Any],
        null: dict[str, Any],
        seeds: Sequence[int],
        sampler: SamplerConfig,
        report: Progress,
    ) -> Tensor:
        index = torch.tensor(seeds, device=self.device)
        size = self.config.latent_size
        shape = (self.config.model.in_channels, size, size)
        noise = randomness.normal(0, "initial noise", index, shape)
        network = guided(
            self.model,
            cond,
            null,
            sampler.guidance,
            sampler.guidance_channels,
            sampler.guidance_interval,
            self.config.diffusion.steps,
            wrap=lambda network: as_cuda_graph(network, noise),
        )
        return sample(
            self.config.diffusion,
            sampler,
            network,
            noise,
            lambda step: randomness.normal(0, f"step noise {step}", index, shape),
            self.config.model.learn_sigma,
            report,
        )

    def _conditioning(self, conditions: Sequence[str | int]) -> dict[str, Any]:
        """Each different prompt is encoded, and its kernels are made, once."""
        if self.config.model.condition == "class":
            return self.conditioner.of_labels(torch.tensor([int(c) for c in conditions]))
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(str, conditions)))}
        prepared = self._prepared(self.conditioner.of_prompts(list(numbers)))
        if len(numbers) == len(conditions):
            return prepared
        rows = torch.tensor([numbers[str(c)] for c in conditions], device=self.device)
        return tree_map(lambda values: values[rows], prepared)

    def _prepared(self, conditioning: Mapping[str, Tensor]) -> dict[str, Any]:
        """The conditioning with all work on the text done that is the same at every step."""
        if self.config.model.condition == "class":
            return dict(conditioning)
        return {**conditioning, "cond": self.model.text_kernels(conditioning["cond"])}


def as_cuda_graph(network: ModelFn, like: Tensor) -> ModelFn:
    """The network as one CUDA graph, for inputs x shaped as ``like``; itself on other devices.

    A replay costs one launch instead of thousands, which is what small batches wait for.
    """
    if like.device.type != "cuda":
        return network
    x, t = torch.zeros_like(like), torch.zeros(len(like), device=like.device)
    side = torch.cuda.Stream(like.device)
    side.wait_stream(torch.cuda.current_stream(like.device))
    with torch.cuda.stream(side):  # kernels are chosen and compiled before the capture, which allows neither
        network(x, t)
    torch.cuda.current_stream(like.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = network(x, t)

    def replay(x_now: Tensor, t_now: Tensor) -> Tensor:
        x.copy_(x_now)
        t.copy_(t_now)
        graph.replay()
        return output.clone()  # the next replay writes into the same memory

    return replay


def load_encoders(config: Config, device: torch.device, dtype: torch.dtype) -> tuple[Autoencoder, Conditioner]:
    """The frozen parts of a config. Raises MissingModelError or ConfigError before anything else is done."""
    if config.model.condition == "text":
        find_fitting_text_encoder(config)
    autoencoder = load_autoencoder(config.autoencoder, device, dtype)
    text = load_text_encoder(config.text_encoder, device, dtype) if config.model.condition == "text" else None
    conditioner = Conditioner(config.model, text, device)
    if autoencoder.latent_channels != config.model.in_channels:
        raise ConfigError(
            f"model.in_channels: {config.model.in_channels}, but the autoencoder's latents have"
            f" {autoencoder.latent_channels} channels"
        )
    return autoencoder, conditioner


def load_pipeline(path: Path, weights: str | None, device: torch.device, dtype: torch.dtype) -> Pipeline:
    """From a run, one of its checkpoints, or an exported folder.

    weights: "weight" or an average such as "ema_0.9999"; None is the first average of the config, or else the
    weights. Raises ValueError (CheckpointError, ConfigError, MissingModelError) saying what is missing.
    """
    if device.type == "cpu":
        keep_freed_memory()
    config, fill = _find_weights(path, weights)
    autoencoder, conditioner = load_encoders(config, device, dtype)
    model = build_network(config.model)
    fill(model)
    return Pipeline(config, model.to(device, dtype).eval().requires_grad_(False), autoencoder, conditioner, device)


def _find_weights(path: Path, weights: str | None) -> tuple[Config, Callable[[Network], None]]:
    if (path / WEIGHTS_FILE).exists():
        _check_exported(path, weights)
        return exported_config(path), lambda model: _fill(model, load_file(path / WEIGHTS_FILE), path)
    run, checkpoint = locate_checkpoint(path)
    config = load_config(run / "config.yaml")
    kind = chosen_weights(weights, config, checkpoint)
    return config, lambda model: _fill(model, dict(read_weights(checkpoint, kind)), checkpoint.path)


def _check_exported(folder: Path, weights: str | None) -> None:
    """Raise ValueError if other weights are asked for than those in an exported folder."""
    origin = folder / "export.json"
    held = read_json(origin).get("weights") if origin.exists() else None
    if weights not in (None, held):
        raise ValueError(f"--weights {weights}: {folder} is exported, and holds {held} alone; give the run instead")


def exported_config(folder: Path) -> Config:
    """The config of an exported folder, with the encoders that lie in it."""
    config = load_config(folder / "config.yaml")
    vae, text = folder / "vae", folder / "text_encoder"
    changes: dict[str, Any] = {}
    if vae.is_dir():
        changes["autoencoder"] = config.autoencoder.model_copy(update={"path": str(vae)})
    if text.is_dir():
        own = {"model": str(text), "weights": "pretrained"}
        changes["text_encoder"] = config.text_encoder.model_copy(update=own)
    return config.model_copy(update=changes)


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


def _fill(model: Network, state: dict[str, Tensor], source: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{source}: not weights of the model in its config: {str(error).splitlines()[1]}") from None
    broken = next((name for name, values in state.items() if not values.isfinite().all()), None)
    if broken:
        raise ValueError(f"{source}: {broken} is not finite, this training diverged; take an earlier checkpoint")


def save_images(images: Tensor, captions: Sequence[str], seeds: Sequence[int], folder: Path) -> None:
    """Single PNGs, numbered, their prompt and seed as metadata, and a grid. images (N, 3, H, W) uint8."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, caption, seed) in enumerate(zip(images, captions, seeds, strict=True)):
        info = PngInfo()
        info.add_itxt("prompt", caption)
        info.add_text("seed", str(seed))
        _to_pil(image).save(folder / f"{number:05d}.png", pnginfo=info)
    make_grid(images, captions).save(folder / "grid.png")


def make_grid(images: Tensor, captions: Sequence[str], most: int = 64) -> Image.Image:
    """The first images side by side, at least 128 pixels each, with their captions underneath."""
    images = images[:most]
    scale = max(1, -(-128 // images.shape[-1]))
    H, W = images.shape[2] * scale, images.shape[3] * scale
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    line, lines = 11, 4
    grid = Image.new("RGB", (columns * (W + 4), rows * (H + line * lines + 4)), "white")
    draw = ImageDraw.Draw(grid)
    for number, (image, caption) in enumerate(zip(images, captions, strict=False)):
        x, y = number % columns * (W + 4), number // columns * (H + line * lines + 4)
        grid.paste(_to_pil(image).resize((W, H), Image.Resampling.NEAREST), (x, y))
        for row, text in enumerate(_wrap(caption, W // 6)[:lines]):
            draw.text((x, y + H + row * line), text.encode("ascii", "replace").decode(), fill="black", font_size=10)
    return grid


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(8, width))
