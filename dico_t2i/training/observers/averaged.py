"""The network with averaged weights, for previews and validation during training."""

from itertools import chain

import torch

from dico_t2i.config import Config
from dico_t2i.models import Network
from dico_t2i.runs.weights import default_weights
from dico_t2i.training.adapted import build_adapted
from dico_t2i.training.engine import Engine
from dico_t2i.training.ranks.distributed import World


@torch.no_grad()
def averaged_model(config: Config, engine: Engine, world: World, dtype: torch.dtype) -> Network:
    """A separate network on every rank, in eval mode, with the first average of the weights; collective."""
    model = build_adapted(config).to(world.device)
    parameters = dict(model.named_parameters())
    for name, value in chain(engine.frozen(), engine.gather(default_weights(config))):
        if name in parameters:  # leaves out the projector of an alignment
            parameters[name].copy_(value)
    return model.to(dtype).eval()
