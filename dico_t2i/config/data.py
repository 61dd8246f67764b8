"""Config sections of the training data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    StrictBool,
    StrictStr,
    model_validator,
)

from dico_t2i.config.base import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section


class SourceConfig(Section):
    """One of the data sets of a mixture."""

    path: str
    name: Annotated[StrictStr, Field(pattern=r"^[\w.-]+$")]  # in metrics and messages
    weight: PositiveFloat = 1.0  # its share of the samples is this over the sum of all, exactly


class CacheConfig(Section):
    """Local copies of the shards that are read, the least recently used ones deleted first; shared by a node."""

    path: str
    max_gb: PositiveFloat  # of 1e9 bytes


class DataConfig(Section):
    """Shards to train on, and the order of their samples."""

    path: str | None = None  # a folder, or a URL that fsspec reads: http://..., s3://...
    mixture: tuple[SourceConfig, ...] = ()  # instead of path
    cache: CacheConfig | None = None  # needed for URLs; useful for slow network folders
    buckets: StrictBool = False  # batches of the shapes that the index gives, instead of squares
    captions: Literal["random", "first", "longest", "weighted"] = "random"  # of a sample's captions, in each epoch
    caption_weights: dict[str, NonNegativeFloat] = {}  # by source, for weighted: {alt: 1, long: 3}; others have 1
    cached_text: StrictBool = False  # text features stored with the samples, instead of encoding captions
    image_size: Positive = 256  # pixels; of images and of the images behind latents
    crop: Literal["center", "resize"] = "center"  # raw images: centre crop, or squeeze to a square
    flip: StrictBool = True
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
        if bool(self.caption_weights) != (self.captions == "weighted"):
            raise ValueError(
                "captions: weighted and data.caption_weights go together, such as caption_weights: {alt: 1, long: 3}"
            )
        if self.mixture and self.buckets:
            raise ValueError("mixture: cannot be used with data.buckets, whose batches come from one data set")
        remote = [path for path in self.paths if "://" in path and not path.startswith("file://")]
        if remote and self.cache is None:
            raise ValueError(
                f"cache: {remote[0]} is read through a local cache; set data.cache: {{path: ..., max_gb: ...}}"
            )
        return self
