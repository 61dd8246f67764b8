"""Checks that a data set fits a config."""

from dico_t2i.config import Config, ConfigError
from dico_t2i.data.index import DatasetIndex
from dico_t2i.data.sample import POOLED, TEXT
from dico_t2i.data.sources import make_order


def check_data(config: Config, index: DatasetIndex) -> None:
    """Raise ConfigError or DataError if the shards lack something that the config needs."""
    if len(index) < config.data.streams:
        raise ConfigError(
            f"data.streams: {config.data.streams} streams need at least as many samples; {index.location} has"
            f" {len(index)}"
        )
    if config.alignment and index.kind == "latents":
        raise ConfigError(
            f"alignment: its encoder needs the images, but {index.location} holds latents; set data.path to the shards"
            " of images that the latents were made from, or leave out alignment"
        )
    unit = config.model.latent_divisor * config.downscale
    for height, width in index.buckets if config.data.buckets else ():
        if height % unit or width % unit:
            raise ConfigError(
                f"data.buckets: {index.location} has a bucket of {height}x{width} pixels, but this network needs sizes"
                f" that are divisible by {unit}; leave out data.buckets, or use a smaller model.patch_size"
            )
    needed = {"cls"} if config.model.condition == "class" else {"json", "txt"}
    for shard in index.starts:
        extensions = set(index.shard(shard).extensions)
        if config.model.num_classes and not extensions & needed:
            raise ConfigError(
                f"model.condition: {config.model.condition} needs a .{' or .'.join(sorted(needed))} member in each"
                f" sample; {index.path(shard)} has {', '.join(sorted(extensions))}"
            )
        if config.data.cached_text:
            _check_features(config, index, extensions)
    make_order(config.data, index, config.seed, config.train.global_batch)


def _check_features(config: Config, index: DatasetIndex, extensions: set[str]) -> None:
    missing = sorted({TEXT, POOLED} - extensions)
    if config.model.condition != "text":
        raise ConfigError(f"data.cached_text: model.condition is {config.model.condition}; it needs no text features")
    if missing or "text_encoder" not in index.meta:
        raise ConfigError(
            f"data.cached_text: {index.location} holds no text features"
            f" ({', '.join(missing) or 'no text_encoder in its metadata'}); encode them with data_prep/latents.py,"
            " or leave out data.cached_text"
        )
