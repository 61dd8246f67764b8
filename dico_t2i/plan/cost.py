"""The arithmetic and memory traffic of a config's training step, found by tracing it without computing."""

import time
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from dico_t2i.config import AdapterConfig, Config, DiffusionConfig, NetworkConfig
from dico_t2i.diffusion import build
from dico_t2i.models import add_adapter, build_network
from dico_t2i.models.cost import example_inputs
from dico_t2i.plan.trace import Pass, trace_training

PLAIN_SHARE = 1 / 16  # assumed rate of fp32 and of depthwise convolutions, relative to bf16 products


@dataclass(frozen=True)
class StepCost:
    """The counted cost of one rank's step.

    flops: two for each multiply-accumulate of matrix products and convolutions, forward and backward; recomputation
    that saves memory does not count. traffic: the bytes that the operations of the network and of the optimizer read
    and write.
    """

    flops: float
    traffic: float

    def rates(self, step_s: float, peak: float) -> dict[str, float]:
        """The utilization and rates of a step that took ``step_s`` seconds, for metrics.jsonl. peak: ``peak_rate``."""
        return {
            "flops_utilization": self.flops / step_s / peak,
            "flops_per_s": self.flops / step_s,
            "bytes_per_s": self.traffic / step_s,
        }


def step_cost(config: Config, ranks: int, parameters: int) -> StepCost:
    """Count the cost of a step without the frozen encoders. This takes a few seconds."""
    micro, passes = config.batching(ranks)
    keeping = config.model_copy(update={"model": config.model.model_copy(update={"checkpoint_stages": ()})})
    useful, done = traced_pass(keeping, micro), traced_pass(config, micro)
    share = 1 / ranks if config.train.zero_stage > 0 else 1.0
    update = share * optimizer_traffic(parameters, len(config.optimizer.ema))
    return StepCost(
        flops=passes * float(useful.products.sum() + useful.others.sum()),
        traffic=passes * float(done.traffic.sum()) + update,
    )


def traced_pass(config: Config, micro_batch: int) -> Pass:
    """One forward and backward pass of a rank's micro-batch, with the loss but without the frozen encoders."""
    precision = autocast(config), _dtype(config)
    return _trace(config.model, config.adapter, config.diffusion, config.latent_size, micro_batch, *precision)


def autocast(config: Config) -> bool:
    """Whether training keeps fp32 weights and computes in bf16 by autocast, as it does at ZeRO stage 0."""
    return config.train.precision == "bf16" and config.train.zero_stage == 0


def rates(config: Config) -> tuple[float, float]:
    """Operations per second of matrix products and of everything else; on CPUs both are equal."""
    peak = 1e12 * config.cluster.hardware.peak_tflops
    plain = peak * (PLAIN_SHARE if config.cluster.gpus_per_node else 1)
    return (peak if config.train.precision == "bf16" else plain), plain


def seconds(config: Config, traced: Pass) -> np.ndarray:
    """The seconds of each operation of a pass: its arithmetic or its memory traffic, whichever takes longer."""
    products, plain = rates(config)
    work = traced.products / products + traced.others / plain
    return np.maximum(work, traced.traffic / (1e9 * config.cluster.hardware.memory_gb_s))


def peak_rate(config: Config, device: torch.device) -> float:
    """The ``product_rate`` of a device in the precision of training; on a CPU in bf16 or fp32, whichever is faster."""
    precision = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    # A CPU's bf16 product may be far slower than what the network does beside it: the faster one is what it can do.
    fallbacks = {torch.float32} if device.type == "cpu" else set()
    return max(product_rate(device, dtype) for dtype in {precision, *fallbacks})


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of one large matrix product: the best of a few runs, which take less than a second."""
    size = 8192 if device.type == "cuda" else 512
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
    """Bytes of AdamW's update: it reads gradient, weight and moments, writes three, and updates each average."""
    return (28 + 12 * averages) * parameters


@cache
def _trace(
    model: NetworkConfig,
    adapter: AdapterConfig | None,
    diffusion: DiffusionConfig,
    size: int,
    micro: int,
    autocast: bool,
    dtype: torch.dtype,
) -> Pass:
    with torch.device("meta"):
        network = build_network(model)
        if adapter:
            add_adapter(network, adapter)
        network.to(dtype).train()
        objective = build(diffusion, model.learn_sigma)

    def loss() -> Tensor:
        with torch.device("meta"):
            x, t, cond, pooled = example_inputs(model, (micro, model.in_channels, size, size), dtype)
            noise = torch.empty_like(x)
            return objective.training_losses(lambda a, b: network(a, b, cond, pooled), x, t, noise)["loss"].mean()

    return trace_training(network, loss, autocast=autocast)


def _dtype(config: Config) -> torch.dtype:
    """The dtype of the weights in the forward pass; ZeRO stage 0 trains fp32 weights under autocast."""
    return torch.bfloat16 if config.train.precision == "bf16" and not autocast(config) else torch.float32
