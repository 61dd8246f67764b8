"""The features of reference sets: computed by the ranks and cached, or read from statistics that others made."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dico_t2i.encoders.local import file_hash
from dico_t2i.files import write_atomically
from dico_t2i.training.ranks.distributed import World
from evals.quality.chunks import Chunks, meet
from evals.quality.distances import Gaussian
from evals.quality.extractors import Features
from evals.quality.feature_sets import FeatureSet, collect
from evals.quality.features import FEATURES, LOGITS, POOL, POOL_DIMENSION, SPATIAL, SPATIAL_DIMENSION
from evals.quality.images import Crop, ImageFiles, ImageSet, counted, npz_members, open_images
from evals.quality.protocol import Extractor, digest

_PATIENCE_S = 86400.0  # how long to wait for another job that computes the same reference


@dataclass(frozen=True)
class FeatureCache:
    """Computes the features of sets of images on the ranks, and caches them.

    The key of the cache is everything that they depend on: the images' contents and preparation, the networks' weights
    and resize, the number of images in a chunk, the rows that are kept. All ranks make the same calls.
    """

    folder: Path
    networks: Sequence[Features]
    world: World
    chunk: int

    def of(self, images: ImageSet, manifold: int | None = None, logits: bool = False) -> FeatureSet:
        """manifold: rows of pooled features to keep; None for all. logits: keep them, for the Inception Score."""
        if not self.networks:
            return FeatureSet(len(images), {})
        identity: list[Any] = [images.identity() if self.world.is_main else None]
        dist.broadcast_object_list(identity, device=self.world.device)
        if self.world.is_main:
            _tell(images, identity[0])
        networks = [network.identity for network in self.networks]
        source = {"images": len(images), **identity[0], "networks": networks}
        key = digest([source, self.chunk, manifold, logits])
        path = self.folder.expanduser() / "references" / f"{key}.safetensors"
        chunks = Chunks(path.with_suffix(".chunks"), len(images), self.chunk)
        with chunks.owned(self.world, _PATIENCE_S):
            if not path.exists():
                self._make(chunks, images, path, manifold, logits, {"key": key, **source})
        return read_statistics(path, self.networks)

    def _make(
        self,
        chunks: Chunks,
        images: ImageSet,
        path: Path,
        manifold: int | None,
        logits: bool,
        source: dict[str, Any],
    ) -> None:
        def compute(index: range) -> dict[str, Tensor]:
            pixels = images.read(index)
            found = {name: value for network in self.networks for name, value in network(pixels).items()}
            return {name: value for name, value in found.items() if logits or name != LOGITS}

        chunks.make(compute, self.world, "reference")
        if self.world.is_main:
            write_atomically(path, _packed(collect(chunks.load(), len(images), manifold), source))
            chunks.remove()
        meet(self.world)

    def of_path(
        self,
        path: Path,
        extractor: Extractor,
        crop: Crop = "none",
        size: int | None = None,
        manifold: int | None = None,
    ) -> FeatureSet:
        """The features of a folder, of an npz file with images or in ADM's layout, or of a file of the cache.

        Raises ValueError for statistics of a different extractor than the protocol's.
        """
        if path.suffix == ".safetensors":
            return read_statistics(path, self.networks)
        statistics = path.suffix == ".npz" and {"mu", "sigma"} <= npz_members(path)
        found = FeatureSet(0, {})
        if not statistics or "arr_0" in npz_members(path):
            images = open_images(path, crop, size)
            found = self.of(images, manifold)
            found.doubts += unread_doubts(path, images)
        if statistics:
            network = self.networks[0].identity if self.networks else {}
            if not network.get("sha256", "").startswith(extractor.sha256 or ""):
                raise ValueError(f"{path}: statistics of a different extractor, the FID Inception, not {network}")
            found.gaussians |= read_adm_statistics(path)
            found.n = 0
            found.source["statistics"] = f"{path.name}, sha256 {file_hash(path)}"
            if extractor.resize != "legacy_tensorflow":
                found.doubts.append(f"{path.name} does not say its resize; ADM's is legacy_tensorflow")
        return found


def unread_doubts(path: Path, images: ImageSet) -> list[str]:
    """The reasons why numbers are doubtful: pictures in the folder that are skipped."""
    count = images.unread if isinstance(images, ImageFiles) else 0
    return [f"{count} pictures of {path} are in formats that cannot be read"] if count else []


def _tell(images: ImageSet, identity: dict[str, str]) -> None:
    """Print once which files are skipped, and which are decoded differently from other evaluations."""
    if not isinstance(images, ImageFiles):
        return
    if images.left_out:
        seen = len(images) + sum(images.left_out.values())
        print(f"{seen} files: {len(images)} images; skipped: {counted(images.left_out)}", flush=True)
    if turned := identity.get("turned_by_exif"):
        print(
            f"note: {turned} of {len(images)} files have an EXIF orientation and are turned, as in training;"
            " clean-fid and others leave them as they are stored",
            flush=True,
        )


def read_statistics(path: Path, networks: Sequence[Features]) -> FeatureSet:
    """Read a file of the cache. Raises ValueError if it is of other networks than these."""
    with safe_open(path, "pt") as file:
        source = json.loads(file.metadata()["source"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    wanted = [network.identity for network in networks]
    if source["networks"] != wanted:
        raise ValueError(
            f"{path}: statistics of a different extractor: {source['networks']}; this protocol's is {wanted}"
        )
    n = int(tensors["n"])
    gaussians = {
        name: Gaussian(tensors[f"mean.{name}"], tensors[f"cov.{name}"])
        for name in FEATURES
        if f"mean.{name}" in tensors
    }
    rows = {name: tensors[f"rows.{name}"] for name in FEATURES if f"rows.{name}" in tensors}
    return FeatureSet(n, gaussians, rows, source)


def read_adm_statistics(path: Path) -> dict[str, Gaussian]:
    """``mu``, ``sigma`` and, for sFID, ``mu_s``, ``sigma_s`` of an npz. Raises ValueError for other dimensions."""
    with np.load(path, allow_pickle=False) as arrays:
        found = {
            name: Gaussian(torch.from_numpy(arrays[mean]).double(), torch.from_numpy(arrays[cov]).double())
            for name, mean, cov in ((POOL, "mu", "sigma"), (SPATIAL, "mu_s", "sigma_s"))
            if mean in arrays and cov in arrays
        }
    for name, (mean, cov) in found.items():
        expected = POOL_DIMENSION if name == POOL else SPATIAL_DIMENSION
        if mean.shape != (expected,) or cov.shape != (expected, expected):
            raise ValueError(
                f"{path}: statistics of a different extractor: mean {tuple(mean.shape)} and covariance"
                f" {tuple(cov.shape)}, but the FID Inception's have dimension {expected}"
            )
    return found


def _packed(features: FeatureSet, source: dict[str, Any]) -> bytes:
    tensors = {"n": torch.tensor(features.n)}
    for name, (mean, cov) in features.gaussians.items():
        tensors |= {f"mean.{name}": mean, f"cov.{name}": cov}
    tensors |= {f"rows.{name}": value for name, value in features.rows.items()}
    return save(tensors, {"source": json.dumps(source)})
