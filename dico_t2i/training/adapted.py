"""Networks of which only an adapter is trained."""

from dico_t2i.config import Config
from dico_t2i.models import Network, add_adapter, build_network
from dico_t2i.runs.checkpoint import CheckpointError, newest_checkpoint
from dico_t2i.runs.folder import RunFolder
from dico_t2i.runs.lineage import KEY
from dico_t2i.sampling.trained import Trained, base_of, check_base


def find_base(config: Config, run: RunFolder) -> Trained | None:
    """The weights that the run's adapter is added to; None without an adapter.

    Raises ConfigError if they are missing, or are not those that the run's newest checkpoint was trained with.
    """
    if config.adapter is None:
        return None
    base = base_of(config)
    try:
        checkpoint = newest_checkpoint(run.checkpoints)
    except CheckpointError:  # none, or a damaged one, of which the restoring tells
        return base
    check_base(checkpoint.state[KEY], base.lineage(), checkpoint.path)
    return base


def build_adapted(config: Config, base: Trained | None = None) -> Network:
    """The network of a config, with an adapter if the config has one.

    The weights are those of the base, or random. Raises ValueError if the base does not fit the network.
    """
    network = build_network(config.model)
    if base:
        base.fill(network)
    if config.adapter:
        add_adapter(network, config.adapter)
    return network
