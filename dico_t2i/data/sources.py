"""Loads the data of a config (a folder, a URL, or a mixture of several) as one index and one order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dico_t2i.config import DataConfig
from dico_t2i.data.cache import cached_index
from dico_t2i.data.errors import DataError
from dico_t2i.data.index import DatasetIndex, load_index
from dico_t2i.data.names import Names
from dico_t2i.data.order import BucketOrder, MixtureOrder, Order, SampleOrder, Source
from dico_t2i.data.shard import ShardIndex

MULTIPLE = 32  # heights and widths in pixels are divisible by it: by 8 for an autoencoder, times 4 for the network

# Metadata of latents that must be equal in all data sets of a mixture.
_LATENTS = ("latent_channels", "latent_size", "image_size", "crop", "mirrored")
_PLACES = ("name", "model", "path", "scale")  # parts of an encoder's identity that do not affect its output


@dataclass(frozen=True)
class MixedIndex(DatasetIndex):
    """Several data sets as one: the shards of the first, then of the second, ...; their names are ``source/shard``."""

    sources: tuple[tuple[str, DatasetIndex], ...] = ()

    @property
    def location(self) -> str:
        return "mixture"

    @property
    def starts(self) -> list[int]:
        """The first shard of each source."""
        return np.cumsum([0, *(len(index.names) for _, index in self.sources)])[:-1].tolist()

    def path(self, shard: int) -> Path:
        index, own = self._own(shard)
        return index.path(own)

    def shard(self, shard: int) -> ShardIndex:
        index, own = self._own(shard)
        return index.shard(own)

    def open(self, shard: int) -> BinaryIO:
        index, own = self._own(shard)
        return index.open(own)

    def _own(self, shard: int) -> tuple[DatasetIndex, int]:
        for _, index in self.sources:
            if shard < len(index.names):
                return index, shard
            shard -= len(index.names)
        raise IndexError(shard)


def load_data(data: DataConfig, *, check: bool = True) -> DatasetIndex:
    """The index of a config's data; a local folder without an index gets one first.

    check: whether the sizes of the shards in local folders are compared with the index. Raises DataError if data cannot
    be used or mixed.
    """
    indexes = [_load(path, data, check) for path in data.paths]
    if not data.mixture:
        return indexes[0]
    sources = tuple((source.name, index) for source, index in zip(data.mixture, indexes, strict=True))
    _check_alike(sources, data.cached_text, data.buckets)
    starts = np.cumsum([0, *(len(index.names) for index in indexes)]).tolist()
    return MixedIndex(
        root=indexes[0].root,
        kind=indexes[0].kind,
        names=Names.joined((f"{name}/", index.names) for name, index in sources),
        samples=np.concatenate([index.samples for index in indexes]),
        bytes=np.concatenate([index.bytes for index in indexes]),
        meta=indexes[0].meta,
        bucket_counts=_all_bucket_counts(sources, data.image_size) if data.buckets else None,
        quarantine={
            start + shard: keys
            for start, index in zip(starts, indexes, strict=False)
            for shard, keys in index.quarantine.items()
        },
        sources=sources,
    )


def make_order(data: DataConfig, index: DatasetIndex, seed: int, global_batch: int) -> SampleOrder:
    """The order of a config's samples. Raises DataError for too few samples or missing buckets."""
    if data.buckets:
        counts, mixture = _bucket_counts(index, data.image_size), []
        if isinstance(index, MixedIndex):
            mixture = [Source(s.name, start, s.weight) for s, start in zip(data.mixture, index.starts, strict=True)]
        return BucketOrder(seed, counts, data.streams, data.shuffle_block, global_batch, mixture)
    if not isinstance(index, MixedIndex):
        return Order(seed, index.samples, data.streams, data.shuffle_block)
    orders = []
    for name, source in index.sources:
        try:
            orders.append(Order(seed, source.samples, data.streams, data.shuffle_block, f" of {name}"))
        except DataError as error:
            raise DataError(f"data.mixture: {name}: {error}") from None
    return MixtureOrder(seed, orders, index.starts, [source.weight for source in data.mixture])


def _load(path: str, data: DataConfig, check: bool) -> DatasetIndex:
    local = path.removeprefix("file://")
    if data.cache is None:
        return load_index(local, check=check)
    if "://" not in local and not (Path(local) / "index.json").exists():
        load_index(local)  # builds the index beside the shards
    return cached_index(path, data.cache, data.retries, data.retry_wait_s)


def same_encoder(made: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether two identities are of encoders with equal outputs; their folders may differ."""
    return _without_place(made) == _without_place(ours)


def _without_place(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {part: value for part, value in identity.items() if part.rpartition(".")[2] not in _PLACES}


def _check_alike(sources: tuple[tuple[str, DatasetIndex], ...], cached_text: bool, buckets: bool) -> None:
    """Raise DataError if data sets differ in kind or in buckets, or if their latents come from different encoders."""
    first_name, first = sources[0]
    encoders = ("autoencoder", "text_encoder") if cached_text else ("autoencoder",)
    for name, index in sources[1:]:
        pairs: dict[str, tuple[Any, Any]] = {"kind": (first.kind, index.kind)}
        pairs |= {key: (first.meta.get(key), index.meta.get(key)) for key in _LATENTS if first.kind == "latents"}
        if buckets:
            pairs["buckets"] = (first.buckets, index.buckets)
        for key in encoders:
            ours, theirs = first.meta.get(key, {}), index.meta.get(key, {})
            pairs |= {} if same_encoder(ours, theirs) else {key: (ours, theirs)}
        for key, (ours, theirs) in pairs.items():
            if ours != theirs:
                raise DataError(
                    f"data.mixture: {first_name} and {name} cannot be mixed: {key} is {ours!r} in {first.location},"
                    f" {theirs!r} in {index.location}"
                )


def _all_bucket_counts(sources: tuple[tuple[str, DatasetIndex], ...], size: int) -> np.ndarray:
    """The bucket counts of the shards of all data sets: int64 (shards, buckets)."""
    return np.concatenate([_bucket_counts(index, size) for _, index in sources])


def _bucket_counts(index: DatasetIndex, size: int) -> np.ndarray:
    if index.bucket_counts is None:
        raise DataError(
            f"{index.location}: data.buckets is set, but its samples have no buckets;"
            f" run python -m dico_t2i.data {index.location} --buckets {size} to assign them"
        )
    odd = next((shape for shape in index.buckets if any(side < MULTIPLE or side % MULTIPLE for side in shape)), None)
    if odd is not None:
        raise DataError(f"{index.location}: bucket {odd[0]} x {odd[1]}: both must be divisible by {MULTIPLE}")
    return index.bucket_counts
