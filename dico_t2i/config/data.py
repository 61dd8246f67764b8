"""Config sections for the training data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dico_t2i.config.base import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section
from dico_t2i.config.yaml12 import Flag, Text


class SourceConfig(Section):
    """One data set of a mixture."""

    path: Text  # The folder or URL of this data set, as in data.path.
    name: Annotated[Text, Field(pattern=r"^[\w.-]+$")]  # The name of this data set in metrics and messages.
    # The share of this data set in the samples is its weight divided by the sum of all weights: exactly, or with
    # data.buckets up to rounding.
    weight: PositiveFloat = 1.0


class CacheConfig(Section):
    """Local copies of shards, shared by the processes of a node; the least recently used ones are deleted first."""

    path: Text  # The folder on a local disk that holds the copies.
    max_gb: PositiveFloat  # The largest size of all copies together, in units of 1e9 bytes.


class DataConfig(Section):
    """The shards to train on, and the order of their samples."""

    # The folder of the shards, or a URL that fsspec reads, such as https://..., s3://... or hf://datasets/OWNER/NAME.
    path: Text | None = None
    mixture: tuple[SourceConfig, ...] = ()  # Several data sets to mix, in place of path.
    cache: CacheConfig | None = None  # A local cache of shards: required for URLs and useful for slow network folders.
    buckets: Flag = False  # Makes batches of the shapes that the data set's index lists, instead of squares.
    # Which of a sample's captions an epoch trains on: one drawn at random, the first, the longest, or one drawn by
    # caption_weights.
    captions: Literal["random", "first", "longest", "weighted"] = "random"
    # The weights of captions: weighted by source, such as {alt: 1, long: 3}; sources that are not listed have 1.
    caption_weights: dict[str, NonNegativeFloat] = {}
    # Reads text features that are stored with the samples, instead of encoding captions.
    cached_text: Flag = False
    # Height and width in pixels of the images, or of the images that the latents were made from.
    image_size: Positive = 256
    # How raw images become squares: by a center crop, or by resizing both sides.
    crop: Literal["center", "resize"] = "center"
    flip: Flag = True  # Mirrors each sample horizontally with probability one half.
    # The number of independent streams of samples, fixed for a run: every number of ranks that divides it sees the same
    # batches.
    streams: Positive = 64
    shuffle_block: Positive = 1024  # How many samples of a stream are shuffled together.
    workers: NonNegative = 4  # The number of reader processes of each rank.
    max_bad_samples: NonNegative = 1000  # The run stops when more than this many unreadable samples were replaced.
    retries: NonNegative = 5  # How many times a read that the file system refuses is tried again.
    # Seconds to wait before the first retry of a read; the wait doubles each time.
    retry_wait_s: NonNegativeFloat = 0.5

    @property
    def paths(self) -> tuple[str, ...]:
        """Return the folder or URL of each data set."""
        return tuple(source.path for source in self.mixture) or (self.path or "",)

    @model_validator(mode="after")
    def _one_origin(self) -> DataConfig:
        if bool(self.path) == bool(self.mixture):
            raise ValueError("path: give either data.path, or data.mixture with several data sets")
        names = [source.name for source in self.mixture]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"mixture: two data sets have the name {twice[0]}; give them different names")
        if bool(self.caption_weights) != (self.captions == "weighted"):
            raise ValueError(
                "captions: weighted and data.caption_weights go together, such as caption_weights: {alt: 1, long: 3}"
            )
        remote = [path for path in self.paths if "://" in path and not path.startswith("file://")]
        if remote and self.cache is None:
            raise ValueError(
                f"cache: {remote[0]} is a URL and needs a local cache; set data.cache: {{path: ..., max_gb: ...}}"
            )
        return self
