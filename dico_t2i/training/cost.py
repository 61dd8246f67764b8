"""The arithmetic and the memory traffic of a config's training step, traced without computing it."""

import time
from functools import cache

import torch
from torch import Tensor

from dico_t2i.config import Config, DiCoConfig, DiffusionConfig
from dico_t2i.diffusion import build
from dico_t2i.models import DiCo
from dico_t2i.models.trace import Pass, trace_training


def traced_pass(config: Config, micro_batch: int) -> Pass:
    """One pass forward and backward of a rank's micro-batch, the loss included, the frozen encoders not."""
    return _trace(config.model, config.diffusion, config.latent_size, micro_batch, autocast(config), _dtype(config))


def autocast(config: Config) -> bool:
    return config.train.precision == "bf16" and config.train.zero_stage == 0


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one large matrix product: the best of a few tries, well under a second of work."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def optimizer_traffic(parameters: int, averages: int) -> int:
    """Bytes of AdamW's update: gradient, weight and moments read, three written, and each average read and written."""
    return (28 + 12 * averages) * parameters


@cache
def _trace(
    model: DiCoConfig, diffusion: DiffusionConfig, size: int, micro: int, autocast: bool, dtype: torch.dtype
) -> Pass:
    with torch.device("meta"):
        network = DiCo(model).to(dtype).train()
        objective = build(diffusion, model.learn_sigma)

    def loss() -> Tensor:
        with torch.device("meta"):
            x, t = torch.empty(micro, model.in_channels, size, size), torch.zeros(micro, dtype=torch.int64)
            cond = torch.zeros(micro, dtype=torch.int64)
            if model.condition == "text":
                cond = torch.empty(micro, model.text_tokens, model.text_dim, dtype=dtype)
            pooled = torch.empty(micro, model.pooled_dim, dtype=dtype) if model.pooled_text else None
            noise = torch.empty_like(x)
            return objective.training_losses(lambda a, b: network(a, b, cond, pooled), x, t, noise)["loss"].mean()

    return trace_training(network, loss, autocast=autocast)


def _dtype(config: Config) -> torch.dtype:
    """Of the weights in the forward pass; ZeRO-0 trains fp32 weights under autocast."""
    return torch.bfloat16 if config.train.precision == "bf16" and not autocast(config) else torch.float32
