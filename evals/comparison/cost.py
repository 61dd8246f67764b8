"""Measures the CPU time of a training step of several networks in turns, which holds while other programs run."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dico_t2i.config import Config
from dico_t2i.diffusion import build
from dico_t2i.encoders import load_text_encoder
from dico_t2i.encoders.conditioner import Conditioner, Conditioning
from dico_t2i.models import build_network
from dico_t2i.training.optimizer import AdamWEMA

WARM_UP = 2  # steps of each before measuring: they make the optimizer's state
ROUNDS = 15
# Compiled networks share the code of their blocks. Beyond torch's limit, those that come last would not be compiled.
RECOMPILATIONS = 256


def kept_step_seconds(names: Sequence[str], configs: Sequence[Config], kept: Path) -> list[float]:
    """The CPU seconds of a step of each config by its name, from a file, so that runs can resume.

    Those that are missing are measured in turns with the first one, and scaled so that its seconds stay as they are.
    """
    found: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    missing = [name for name in names if name not in found]
    if missing:
        measured = dict.fromkeys([names[0], *missing], 0.0)
        by_name = dict(zip(names, configs, strict=True))
        measured = dict(zip(measured, step_seconds([by_name[name] for name in measured], ROUNDS), strict=True))
        scale = found.get(names[0], measured[names[0]]) / measured[names[0]]
        found |= {name: scale * measured[name] for name in missing}
        kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return [found[name] for name in names]


def step_seconds(configs: Sequence[Config], rounds: int) -> list[float]:
    """The seconds of CPU time of one training step of each config on one thread: medians over the rounds."""
    from torch._dynamo import config as dynamo  # its import takes a second

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with dynamo.patch(recompile_limit=RECOMPILATIONS):
            steps = [training_step(config) for config in configs]
            for step in steps:
                for _ in range(WARM_UP):
                    step()
            seconds = [[_seconds(step) for step in steps] for _ in range(rounds)]
    finally:
        torch.set_num_threads(threads)
    return [statistics.median(each) for each in zip(*seconds, strict=True)]


def training_step(config: Config) -> Callable[[], None]:
    """A training step on random latents: text encoder, network forward and backward, optimizer and its averages."""
    model, batch = config.model, config.train.micro_batch
    generator = torch.Generator().manual_seed(0)
    shape = (batch, model.in_channels, config.latent_size, config.latent_size)
    x, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    t = torch.randint(0, config.diffusion.steps, (batch,), generator=generator)
    process, network, condition = build(config.diffusion, model.learn_sigma), build_network(model), _condition(config)
    optimizer = AdamWEMA(network.parameters(), config.optimizer)
    if config.train.compile == "blocks":
        network.compile_blocks()

    def step() -> None:
        conditioning = condition()
        losses = process.training_losses(lambda x, t: network(x, t, **conditioning), x, t, noise)
        losses["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _condition(config: Config) -> Callable[[], Conditioning]:
    """What encodes the conditions of a micro-batch: its labels, or its captions."""
    model, batch, device = config.model, config.train.micro_batch, torch.device("cpu")
    if model.condition == "class":
        conditioner = Conditioner(model, None, device)
        return lambda: conditioner.of_labels(torch.arange(batch) % model.num_classes)
    of_text = Conditioner(model, load_text_encoder(config.text_encoder, device, torch.float32), device)
    prompts = ["a small red circle on the left on a white background"] * batch
    return lambda: of_text.of_prompts(prompts)


def _seconds(run: Callable[[], None]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started
