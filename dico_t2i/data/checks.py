"""Whether a data set fits a config."""

from dico_t2i.config import Config, ConfigError
from dico_t2i.data.index import DatasetIndex


def check_data(config: Config, index: DatasetIndex) -> None:
    """Raise ConfigError if the shards have not what the config needs."""
    if len(index) < config.data.streams:
        raise ConfigError(
            f"data.streams: {config.data.streams} streams need at least as many samples; {index.root} has {len(index)}"
        )
    extensions = set(index.shard(0).extensions)
    needed = {"cls"} if config.model.condition == "class" else {"json", "txt"}
    if not extensions & needed:
        raise ConfigError(
            f"model.condition: {config.model.condition} needs a .{' or .'.join(sorted(needed))} member in each sample;"
            f" {index.path(0)} has {', '.join(sorted(extensions))}"
        )
