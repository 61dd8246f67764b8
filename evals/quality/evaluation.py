"""Evaluates one checkpoint under one protocol: reference, samples, numbers, result. All scripts share this code."""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from dico_t2i.runs.copies import opened
from dico_t2i.sampling.images import make_grid
from dico_t2i.training.observers.memory_report import peak_memory_bytes
from dico_t2i.training.observers.tracking import log_evaluation
from dico_t2i.training.ranks.distributed import World, join_world
from evals.quality import results, scoring
from evals.quality.chunks import Chunks
from evals.quality.extractors import CAPTION_NETWORKS, IMAGE_NETWORKS, Features, Scorer, load_inception
from evals.quality.feature_sets import FeatureSet, collect
from evals.quality.features import Models
from evals.quality.generation import EXAMPLES, Generator, find_subject, save_pngs
from evals.quality.images import write_npz
from evals.quality.metrics import networks_of
from evals.quality.protocol import Extractor, Protocol, Scoring, changes_of, digest
from evals.quality.references import FeatureCache
from evals.quality.weights import Weights

_PATIENCE = timedelta(days=7)  # of ranks that wait for each other at the end of a stage


@dataclass(frozen=True)
class Networks:
    """The networks that images are evaluated with. scorers: those that also read the captions."""

    images: tuple[Features, ...]
    scorers: tuple[Scorer, ...]
    doubts: tuple[str, ...]

    @property
    def outputs(self) -> set[str]:
        return {name for network in self.images for name in network.outputs}

    @property
    def identities(self) -> list[dict[str, str]]:
        return [network.identity for network in self.images] + [scorer.identity for scorer in self.scorers]


def join(threads: int) -> World:
    """Join the ranks. Arithmetic on a CPU depends on the number of threads, so all runs use the same number."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    return join_world(_PATIENCE)


def load_networks(
    extractor: Extractor, settings: Scoring, args: argparse.Namespace, weights: Weights | None, device: torch.device
) -> Networks:
    """Load the networks that the wanted metrics need. Raises MissingModelError or ValueError."""
    given = {name: getattr(args, name) for name in Models.model_fields}
    wanted = {name: given[name] or getattr(settings, name) for name in given.keys() & networks_of(args.metrics)}
    images = [load_inception(extractor, weights, device)] if weights else []
    images += [load(wanted[name], device) for name, load in IMAGE_NETWORKS.items() if name in wanted]
    scorers = [load(wanted[name], device) for name, load in CAPTION_NETWORKS.items() if name in wanted]
    doubts = [weights.doubt] if weights and weights.doubt else []
    doubts += [
        f"the {name} model is not the protocol's: {path}"
        for name, path in given.items()
        if path and Path(path).name != Path(getattr(settings, name)).name
    ]
    return Networks(tuple(images), tuple(scorers), tuple(doubts))


class Evaluation:
    """The parts that several evaluations with the same networks and reference set share."""

    def __init__(
        self,
        args: argparse.Namespace,
        protocol: Protocol,
        conditions: Sequence[str | int],
        sources: dict[str, Any],
        weights: Weights | None,
        make_reference: Callable[[FeatureCache], FeatureSet],
    ) -> None:
        """Check everything and compute the reference's features; collective. Raises ValueError."""
        self.args, self.protocol, self.conditions = args, protocol, conditions
        self.subject = find_subject(opened(args.checkpoint), protocol)
        self.folder: Path = (args.out or self.subject.folder / "evals").resolve()
        self.world = join(args.threads)
        self.networks = load_networks(protocol.extractor, protocol.scoring, args, weights, self.world.device)
        self.reference = make_reference(FeatureCache(args.cache, self.networks.images, self.world, protocol.chunk))
        samples, outputs = protocol.prompts.count, self.networks.outputs
        scoring.check_metrics(protocol.scoring, args.metrics, samples, outputs, self.reference)
        self.sources = {**sources, "reference": self.reference.source, "networks": self.networks.identities}
        if self.world.is_main and weights:
            for line in scoring.warnings(samples, self.reference):
                print(f"warning: {line}", flush=True)

    def run(self, protocol: Protocol) -> dict[str, Any] | None:
        """Generate, score, write and print; the result on rank 0, None on the others; collective.

        A result that exists already is not computed again.
        """
        args, subject = self.args, self.subject
        key = digest([protocol.hash(), subject.identity, self.sources, args.save, sorted(args.metrics), args.resamples])
        path = results.result_path(self.folder, protocol.name + _tag(protocol), subject.step)
        done = _read(path)
        if done and done["key"] == key:
            if self.world.is_main:
                results.print_result(done)
            return done
        chunks = Chunks(path.with_suffix(f".{key}"), protocol.prompts.count, protocol.chunk)
        with chunks.owned(self.world):
            generated = self._generate(chunks, protocol, path)
            if not self.world.is_main:
                return None
            result = self._result(protocol, generated, key)
            self._keep_images(chunks, protocol, path)
            results.write_result(path, result)
            chunks.remove()
        results.print_result(result)
        print(f"result: {path}")
        log_evaluation(subject.config, subject.folder, result, path.with_suffix(".png"))
        return result

    def _generate(self, chunks: Chunks, protocol: Protocol, path: Path) -> FeatureSet:
        pngs = path.with_suffix(".images") if self.args.save == "png" else None
        generator = Generator(
            self.subject,
            protocol,
            self.conditions,
            self.networks.images,
            self.networks.scorers,
            self.world.device,
            pngs,
            self.args.save == "npz",
        )
        chunks.make(generator, self.world, f"{protocol.name}, step {self.subject.step}")
        return collect(chunks.load(), protocol.prompts.count) if self.world.is_main else FeatureSet(0, {})

    def _result(self, protocol: Protocol, generated: FeatureSet, key: str) -> dict[str, Any]:
        began = time.perf_counter()
        device, wanted = self.world.device, self.args.metrics
        numbers, errors = scoring.score(
            protocol.scoring, wanted, generated.to(device), self.reference.to(device), self.args.resamples
        )
        changes, doubts = changes_of(protocol), [*self.networks.doubts, *self.reference.doubts]
        names = ("sampling", "decoding", "features")
        return {
            "key": key,
            "subject": f"{self.subject.config.name}, step {self.subject.step}",
            "checkpoint": str(self.subject.path),
            "step": self.subject.step,
            "weights": self.subject.weights,
            "images": generated.n,
            "protocol": protocol.content(),
            "protocol_hash": protocol.hash(),
            "comparable": not (changes or doubts),
            "changes": changes,
            "doubts": doubts,
            "numbers": numbers,
            "standard_errors": errors,
            "sources": self.sources,
            "seconds": {
                **dict(zip(names, generated.seconds.tolist(), strict=True)),
                "statistics": time.perf_counter() - began,
            },
            "peak_memory_gb": peak_memory_bytes(self.world.device) / 1e9,
            "machine": {
                "device": _device_name(self.world.device),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            },
        }

    def _keep_images(self, chunks: Chunks, protocol: Protocol, path: Path) -> None:
        """Save a grid of the first images, and these as PNGs for compare.py; on request save all images as npz."""
        first = next(chunks.load())["images"][:EXAMPLES]
        captions = [str(c) for c in self.conditions[: len(first)]]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_pngs(first, captions, [protocol.seed + i for i in range(len(first))], path.with_suffix(".examples"), 0)
        make_grid(first, captions).save(path.with_suffix(".png"))
        if self.args.save == "npz":
            size = protocol.image_size
            pixels = (chunk["images"].permute(0, 2, 3, 1).numpy() for chunk in chunks.load())
            write_npz(path.with_suffix(".npz"), (protocol.prompts.count, size, size, 3), pixels)


def _tag(protocol: Protocol) -> str:
    """A name that distinguishes the results of different changes to one protocol."""
    return f"-{protocol.hash()}" if protocol.name.endswith("+changes") else ""


def _read(path: Path) -> dict[str, Any] | None:
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
