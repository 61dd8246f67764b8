"""Samples a checkpoint and computes features, in chunks: image i depends on the protocol and i alone."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dico_t2i.config import Config, load_config
from dico_t2i.runs.folder import MANIFEST
from dico_t2i.runs.kinds import WEIGHT
from dico_t2i.runs.weights import default_weights, exported_weights, locate_checkpoint, trained_config
from dico_t2i.sampling.images import save_image
from dico_t2i.sampling.pipeline import Pipeline, load_pipeline
from evals.quality.extractors import Features, Scorer
from evals.quality.images import Image
from evals.quality.protocol import Protocol, digest

EXAMPLES = 8


@dataclass(frozen=True)
class Subject:
    """The run or export that is evaluated. folder: its folder. identity: changes with the weights."""

    path: Path
    folder: Path
    config: Config
    step: int
    weights: str
    identity: str


def find_subject(path: Path, protocol: Protocol) -> Subject:
    """Find the weights to evaluate. Raises ValueError, before anything is loaded, if they do not fit the protocol."""
    file = exported_weights(path)
    if file is not None:
        subject = _exported(path, file)
    else:
        folder, checkpoint = locate_checkpoint(path)
        config = trained_config(folder, checkpoint)
        weights = default_weights(config) if protocol.weights == "ema" else WEIGHT
        identity = digest((checkpoint.path / MANIFEST).read_text())
        subject = Subject(checkpoint.path, folder, config, checkpoint.step, weights, identity)
        if weights not in checkpoint.kinds:
            raise ValueError(f"{checkpoint.path}: it has no {weights}, only {', '.join(checkpoint.kinds)}")
    if protocol.weights == "ema" and subject.weights == WEIGHT:
        raise ValueError(
            f"{path}: it has no average of the weights (optimizer.ema is empty), but {protocol.name} evaluates one; to"
            " evaluate the weights themselves, with a result that is not comparable: --set weights=weight"
        )
    _check_fit(subject, protocol)
    return subject


def _exported(path: Path, weights: Path) -> Subject:
    origin = json.loads((path / "export.json").read_text(encoding="utf-8"))
    stat = weights.stat()
    identity = digest([origin, stat.st_size, stat.st_mtime_ns])
    return Subject(path, path, load_config(path / "config.yaml"), origin["step"], origin["weights"], identity)


def _check_fit(subject: Subject, protocol: Protocol) -> None:
    config, size = subject.config, subject.config.data.image_size
    if size != protocol.image_size:
        raise ValueError(
            f"{subject.path}: it makes images of {size} px, but {protocol.name} is for {protocol.image_size}; for a"
            f" result that is not comparable: --set image_size={size}"
        )
    kind = "class" if protocol.prompts.rule == "uniform" else "text"
    if config.model.condition != kind:
        raise ValueError(
            f"{subject.path}: it is {config.model.condition}-conditional, but {protocol.name} is for {kind}"
        )
    if protocol.prompts.classes not in (None, config.model.num_classes):
        raise ValueError(
            f"{subject.path}: it has {config.model.num_classes} classes, but {protocol.name} has"
            f" {protocol.prompts.classes}; for a result that is not comparable:"
            f" --set prompts.classes={config.model.num_classes}"
        )


class Generator:
    """Computes a chunk: samples, their features, and their scores."""

    def __init__(
        self,
        subject: Subject,
        protocol: Protocol,
        conditions: Sequence[str | int],
        networks: Sequence[Features],
        scorers: Sequence[Scorer],
        device: torch.device,
        pngs: Path | None = None,
        keep: bool = False,
    ) -> None:
        """pngs: folder for all images. keep: whether chunks contain all images."""
        self.protocol, self.conditions = protocol, conditions
        self.networks, self.scorers, self.pngs, self.keep = networks, scorers, pngs, keep
        dtype = torch.bfloat16 if protocol.precision == "bf16" else torch.float32
        self.pipeline: Pipeline = load_pipeline(subject.path, subject.weights, device, dtype)

    def __call__(self, index: range) -> dict[str, Tensor]:
        """Compute the chunk of these images. seconds: of sampling, decoding, features."""
        captions = [str(c) for c in self.conditions[index.start : index.stop]]
        images, sampling, decoding = self._sample(index)
        began = time.perf_counter()
        pixels: list[Image] = list(images.permute(0, 2, 3, 1).contiguous().numpy())
        chunk = {name: value for network in self.networks for name, value in network(pixels).items()}
        for scorer in self.scorers:
            chunk |= scorer(pixels, captions)
        if self.pngs:
            save_pngs(images, captions, [self.protocol.seed + i for i in index], self.pngs, index.start)
        chunk["seconds"] = torch.tensor([sampling, decoding, time.perf_counter() - began])
        if self.keep:
            chunk["images"] = images
        elif index.start == 0:
            chunk["images"] = images[:EXAMPLES].contiguous()
        return chunk

    def _sample(self, index: range) -> tuple[Tensor, float, float]:
        """Images (n, 3, H, W) uint8, and the seconds of sampling and of decoding."""
        began = time.perf_counter()
        sampled = began

        def steps(done: int, total: int) -> None:
            nonlocal sampled
            if done == total:
                if self.pipeline.device.type == "cuda":
                    torch.cuda.synchronize()
                sampled = time.perf_counter()

        conditions = self.conditions[index.start : index.stop]
        seeds = [self.protocol.seed + i for i in index]
        with tf32(self.protocol.precision == "tf32"):
            images = self.pipeline.generate(conditions, seeds, self.protocol.sampler, len(index), steps)
        return images, sampled - began, time.perf_counter() - sampled


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Use TensorFloat-32 in matrix products and convolutions of a GPU, or not; features are always computed without."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def save_pngs(images: Tensor, captions: Sequence[str], seeds: Sequence[int], folder: Path, first: int) -> None:
    """Save (N, 3, H, W) uint8 as one PNG per image, numbered from ``first``, with prompt and seed as metadata.

    Each file is complete or absent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, caption, seed) in enumerate(zip(images, captions, seeds, strict=True), first):
        save_image(image, caption, seed, folder / f"{number:06d}.png")
