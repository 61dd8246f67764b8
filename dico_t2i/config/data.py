"""Config sections of the training data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dico_t2i.config.base import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section
from dico_t2i.config.yaml12 import Flag, Text


class SourceConfig(Section):
    """One of the data sets of a mixture."""

    path: Text
    name: Annotated[Text, Field(pattern=r"^[\w.-]+$")]  # in metrics and messages
    weight: PositiveFloat = 1.0  # its share of the samples is this over the sum of all, exactly


class CacheConfig(Section):
    """Local copies of the shards that are read, the least recently used ones deleted first; shared by a node."""

    path: Text
    max_gb: PositiveFloat  # of 1e9 bytes


class DataConfig(Section):
    """Shards to train on, and the order of their samples."""

    path: Text | None = None  # a folder, or a URL that fsspec reads: http://..., s3://...
    mixture: tuple[SourceConfig, ...] = ()  # instead of path
    cache: CacheConfig | None = None  # needed for URLs; useful for slow network folders
    buckets: Flag = False  # batches of the shapes that the index gives, instead of squares
    cached_text: Flag = False  # text features stored with the samples, instead of encoding captions
    image_size: Positive = 256  # pixels; of images and of the images behind latents
    crop: Literal["center", "resize"] = "center"  # raw images: centre crop, or squeeze to a square
    flip: Flag = True
    streams: Positive = 64  # fixed for a run: any number of ranks dividing it sees the same batches
    shuffle_block: Positive = 1024  # samples of a stream shuffled together
    workers: NonNegative = 4  # reader processes per rank
    max_bad_samples: NonNegative = 1000  # replaced samples after which the run stops
    retries: NonNegative = 5  # of a read that the file system refuses; the waits double, from retry_wait_s
    retry_wait_s: NonNegativeFloat = 0.5

    @property
    def paths(self) -> tuple[str, ...]:
        """The folder or URL of each data set."""
        return tuple(source.path for source in self.mixture) or (self.path or "",)

    @model_validator(mode="after")
    def _one_origin(self) -> DataConfig:
        if bool(self.path) == bool(self.mixture):
            raise ValueError("path: give data.path, or data.mixture with several; one of the two")
        names = [source.name for source in self.mixture]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"mixture: the name {twice[0]} is given to two data sets; names must differ")
        if self.mixture and self.buckets:
            raise ValueError("mixture: cannot be used with data.buckets, whose batches come from one data set")
        remote = [path for path in self.paths if "://" in path and not path.startswith("file://")]
        if remote and self.cache is None:
            raise ValueError(
                f"cache: {remote[0]} is read through a local cache; set data.cache: {{path: ..., max_gb: ...}}"
            )
        return self
