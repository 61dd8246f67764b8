"""Train two steps of the real engine on random latents; print the most bytes that tensors held, and when.

python -m tests.plan_memory CONFIG.yaml
"""

import json
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dico_t2i.config import load_config
from dico_t2i.diffusion import build
from dico_t2i.models import build_network
from dico_t2i.training.engine import Engine
from dico_t2i.training.ranks.distributed import join_world, leave_world


def main(path: Path) -> None:
    config, world = load_config(path), join_world()
    micro, accumulation = config.batching(world.size)
    diffusion = build(config.diffusion, config.model.learn_sigma)
    network, size = config.model, config.latent_size

    def loss(model) -> torch.Tensor:
        """Of a batch made here, so that the inputs are counted."""
        cond = torch.zeros(micro, dtype=torch.int64)
        if network.condition == "text":
            cond = torch.randn(micro, network.text_tokens, network.text_dim)
        x, t = torch.randn(micro, network.in_channels, size, size), torch.zeros(micro, dtype=torch.int64)
        kind = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        cond = cond.to(kind) if cond.is_floating_point() else cond
        losses = diffusion.training_losses(lambda a, b: model(a, b, cond), x, t, torch.randn_like(x))
        return losses["loss"].mean()

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        batching = (micro, accumulation)
        engine = Engine(build_network(network), config.train, config.optimizer, batching, world, config.cluster)
        engine.materialize(0)
        for _ in range(2):
            for _ in range(accumulation):
                engine.backward(loss(engine.model))
                engine.step(1e-4)
    held = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    if world.is_main:
        print("RESULT", json.dumps({"peak": most, "left": held}))
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
