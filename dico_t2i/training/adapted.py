"""Networks of which only an adapter is trained."""

from dico_t2i.config import Config
from dico_t2i.models import Network, add_adapter, build_network
from dico_t2i.runs.checkpoint import Checkpoint
from dico_t2i.runs.lineage import KEY
from dico_t2i.sampling.trained import Trained, base_of, check_base


def find_base(config: Config, checkpoint: Checkpoint | None) -> Trained | None:
    """The weights that the run's adapter is added to; None without an adapter.

    checkpoint: the run's newest. Raises ConfigError if the weights are missing, or are not those that the checkpoint
    was trained with.
    """
    if config.adapter is None:
        return None
    base = base_of(config)
    if checkpoint is not None:
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
