"""Measures the CPU time of a training step of several networks in turns, which holds while other programs run."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from dico_t2i.config import Config
from dico_t2i.diffusion import build
from dico_t2i.encoders.load import load_encoders
from dico_t2i.models import build_network
from dico_t2i.training.optimizer import AdamWEMA

WARM_UP = 2  # steps of each before measuring: they make the optimizer's state


def step_seconds(configs: Sequence[Config], rounds: int) -> list[float]:
    """The seconds of CPU time of one training step of each config on one thread: medians over the rounds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = [training_step(config) for config in configs]
        for step in steps:
            for _ in range(WARM_UP):
                step()
        seconds = [[_seconds(step) for step in steps] for _ in range(rounds)]
    finally:
        torch.set_num_threads(threads)
    return [statistics.median(each) for each in zip(*seconds, strict=True)]


def training_step(config: Config) -> Callable[[], None]:
    """A training step on random images: text encoder, network forward and backward, optimizer and its averages."""
    device, model, batch = torch.device("cpu"), config.model, config.train.micro_batch
    _, conditioner = load_encoders(config, device, torch.float32)
    generator = torch.Generator().manual_seed(0)
    shape = (batch, model.in_channels, config.latent_size, config.latent_size)
    x, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    t = torch.randint(0, config.diffusion.steps, (batch,), generator=generator)
    prompts = ["a small red circle on the left on a white background"] * batch
    process, network = build(config.diffusion, model.learn_sigma), build_network(model)
    optimizer = AdamWEMA(network.parameters(), config.optimizer)

    def step() -> None:
        conditioning = conditioner.of_prompts(prompts)
        losses = process.training_losses(lambda x, t: network(x, t, **conditioning), x, t, noise)
        losses["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _seconds(run: Callable[[], None]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started
