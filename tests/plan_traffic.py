"""Run under torchrun: the collectives in a step of the real engine, for each ZeRO stage that is given.

Of each: its name, its bytes, whether it was called while gradients were computed, and between how many ranks. STAGE may
be 3:GROUP, with a copy of the weights in each group of ranks.

python -m tests.plan_traffic CONFIG.yaml STAGE ...
"""

import json
import sys
from functools import partial

import torch
import torch.distributed as dist

from dico_t2i.config import Config, load_config
from dico_t2i.models import build_network
from dico_t2i.training.engine import Engine
from dico_t2i.training.ranks.distributed import World, join_world, leave_world

# Where each has the tensor that is as large as what all ranks have together.
WHOLE = {
    "all_reduce": (0, "tensor"),
    "all_gather_into_tensor": (0, "output_tensor"),
    "reduce_scatter_tensor": (1, "input"),
}
STEPS = 3  # ZeRO-3 learns in the first which weights it can keep

Collective = tuple[str, int, bool, int]
sent: list[Collective] = []


def noted(name, original, *args, **kwargs):
    position, keyword = WHOLE[name]
    tensor = kwargs[keyword] if keyword in kwargs else args[position]
    ranks = dist.get_world_size(kwargs.get("group"))
    sent.append((name, tensor.numel() * tensor.element_size(), torch._C._current_graph_task_id() != -1, ranks))
    return original(*args, **kwargs)


def step_traffic(config: Config, world: World) -> list[Collective]:
    micro, accumulation = config.batching(world.size)
    network, batching = build_network(config.model), (micro, accumulation)
    engine = Engine(network, config.train, config.optimizer, batching, world, config.cluster)
    engine.materialize(0)
    x = torch.zeros(micro, config.model.in_channels, config.latent_size, config.latent_size)
    t = torch.zeros(micro, dtype=torch.int64)
    for _ in range(STEPS):
        sent.clear()
        for _ in range(accumulation):
            engine.backward(engine.model(x, t, t).float().square().mean())
            engine.step(1e-4)
    return list(sent)


def _changes(stage: str, group: str = "null") -> list[str]:
    return [f"train.zero_stage={stage}", f"train.zero_group={group}"]


def main(path: str, stages: list[str]) -> None:
    for name in WHOLE:
        setattr(dist, name, partial(noted, name, getattr(dist, name)))
    world = join_world()
    results = {stage: step_traffic(load_config(path, _changes(*stage.split(":"))), world) for stage in stages}
    if world.is_main:
        print("RESULT", json.dumps(results))
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
