"""The networks that evals/throughput.py compares, and functions that do each kind of work with them once."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dico_t2i.config import (
    NETWORKS,
    DiCoConfig,
    DiffusionConfig,
    NetworkConfig,
    OptimizerConfig,
    SamplerConfig,
    SizedConfig,
)
from dico_t2i.diffusion import Process, build, guided, sample
from dico_t2i.models import DiCo, Network, build_network
from dico_t2i.ops import text_dwconv
from dico_t2i.plan.cost import optimizer_traffic
from dico_t2i.plan.trace import Pass, trace_training
from dico_t2i.sampling.pipeline import as_cuda_graph
from dico_t2i.training.optimizer import AdamWEMA
from evals.speed.measure import Contender, Cost, pass_cost
from evals.speed.plain_dico import PlainDiCo, grouped_text_dwconv

Condition = Literal["class", "text"]
_OPTIMIZER = OptimizerConfig()
_OBJECTIVES = {learn_sigma: build(DiffusionConfig(), learn_sigma) for learn_sigma in (True, False)}


def named_config(name: str, condition: Condition, size: int) -> NetworkConfig:
    """The config of a named size, such as DiCo-S or DiT-XL/2, for latents of ``size``. Raises ValueError."""
    section = next((section for section in NETWORKS if name in section.variants), None)
    if section is None:
        raise ValueError(f"{name}: not one of {', '.join(name for s in NETWORKS for name in s.variants)}")
    fields: dict[str, Any] = {"variant": name, "condition": condition}
    if issubclass(section, SizedConfig):
        fields["latent_size"] = size
    try:
        return section.model_validate(fields)
    except ValidationError:
        raise ValueError(f"{name}: it does not support condition {condition}") from None


def takes_text(name: str) -> bool:
    """Whether a named size belongs to a network for text alone."""
    text = (section for section in NETWORKS if section.model_fields["condition"].default == "text")
    return any(name in section.variants for section in text)


class Setting:
    """What all contenders of a case share: the model's dimensions, the batch, the inputs, the device."""

    def __init__(self, config: NetworkConfig, batch: int, size: int, device: torch.device) -> None:
        self.config, self.batch, self.size, self.device = config, batch, size, device
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        self.x, self.noise = draw(batch, 4, size, size), draw(batch, 4, size, size)
        self.t = torch.randint(0, 1000, (batch,), generator=generator).to(device)
        self.cond, self.null = self.t, torch.full((1,), config.num_classes, device=device)
        if config.condition == "text":
            self.cond, self.null = (draw(n, config.text_tokens, config.text_dim) for n in (batch, 1))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that our network computes in, which is that of training."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def network_of(kind: str, setting: Setting) -> nn.Module:
    """Our network (ours), the plain one, or a named size such as DiT-S/2; on the current device, fp32, no weight 0."""
    torch.manual_seed(0)
    network: nn.Module
    if kind in ("ours", "plain"):
        assert isinstance(setting.config, DiCoConfig)
        network = DiCo(setting.config) if kind == "ours" else PlainDiCo(setting.config)
    else:
        network = build_network(named_config(kind, setting.config.condition, setting.size))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return network


def contender(
    kind: str, setting: Setting, work: Literal["step", "pass"], how: Literal["", "autocast", "compiled"] = ""
) -> Contender:
    """A network at work: a training step (forward, backward, AdamW, average of the weights), or one pass.

    All networks make a pass in the working dtype of ours. All are trained like ours, except "plain" and those under
    "autocast": they have fp32 weights. how: "autocast" runs them under bf16 autocast, "compiled" also under
    torch.compile (ours: block by block).
    """
    with setting.device:
        network = network_of(kind, setting).to(setting.device)
    if work == "pass":
        network = network.to(setting.dtype).eval().requires_grad_(False)
    if how == "compiled":
        network = _compiled(network)
    released = kind == "plain" or how == "autocast"
    lower = how != "" and released
    cost = None if how == "compiled" and kind != "ours" else _counted(kind, setting, work, released, lower)
    run: Callable[[], Any]
    if work == "pass":
        cond = setting.cond.to(setting.dtype) if setting.config.condition == "text" else setting.cond

        @torch.no_grad()
        def run() -> Tensor:
            return network(setting.x.to(setting.dtype), setting.t, cond)

        held = float(sum(p.nbytes for p in network.parameters()))
    else:
        run = TrainingStep(network, setting, ours=not released, lower=lower)
        held = run.held
    return Contender(f"{kind}, {how}" if how else kind, run, setting.batch, held, cost)


class TrainingStep:
    """Forward, backward, AdamW and the average of the weights, on one device without DeepSpeed.

    Ours is trained as in training: working weights in bf16 on a GPU, masters and averages in fp32 with the project's
    optimizer. Others are trained as released: fp32 weights, torch's AdamW, averages one parameter at a time.
    """

    def __init__(self, network: nn.Module, setting: Setting, ours: bool, lower: bool) -> None:
        self.network, self.setting = network.train(), setting
        self.context: Callable[[], AbstractContextManager[Any]] = nullcontext
        if lower:
            self.context = lambda: torch.autocast(setting.device.type, torch.bfloat16)
        self.weights: list[Tensor] = list(network.parameters())
        self.masters = self.weights
        if ours and setting.dtype != torch.float32:
            self.masters = [w.detach().clone().requires_grad_() for w in self.weights]
            network.to(setting.dtype)
        self.averages = [] if ours else [w.detach().clone() for w in self.weights]
        self.optimizer = AdamWEMA(self.masters, _OPTIMIZER) if ours else torch.optim.AdamW(self.weights, _OPTIMIZER.lr)

    @property
    def held(self) -> float:
        """The bytes of weights, masters, averages and both moments."""
        kept = [*self.averages, *self.weights, *(self.masters if self.masters is not self.weights else ())]
        own = sum(4 * (2 + len(_OPTIMIZER.ema) * (not self.averages)) * master.numel() for master in self.masters)
        return float(sum(tensor.nbytes for tensor in kept) + own)

    def __call__(self) -> Tensor:
        setting = self.setting
        cond = setting.cond.to(self.weights[0].dtype) if setting.config.condition == "text" else setting.cond

        def network(x: Tensor, t: Tensor) -> Tensor:
            return self.network(x, t, cond)

        with self.context():
            loss = _objective(self.network).training_losses(network, setting.x, setting.t, setting.noise)["loss"].mean()
        loss.backward()
        self._update()
        return loss

    @torch.no_grad()
    def _update(self) -> None:
        if self.masters is self.weights:
            self.optimizer.step()
        else:
            pairs = [(m, w) for m, w in zip(self.masters, self.weights, strict=True) if w.grad is not None]
            for master, _ in pairs:
                master.grad = torch.empty_like(master)
            torch._foreach_copy_([cast(Tensor, m.grad) for m, _ in pairs], [cast(Tensor, w.grad) for _, w in pairs])
            self.optimizer.step()
            torch._foreach_copy_(self.weights, self.masters)
        for average, weight in zip(self.averages, self.weights, strict=False):
            average.mul_(0.9999).add_(weight, alpha=1e-4)
        for weight in (*self.weights, *self.masters):
            weight.grad = None


def samplers(setting: Setting, steps: int, guidance: float) -> Iterator[Contender]:
    """Sampling with guidance: by ours, by ours with text kernels made at every step, and by the plain network."""
    sampler = SamplerConfig(kind="dpm++", steps=steps, guidance=guidance)
    cond, null = ({"cond": c.to(setting.dtype)} for c in (setting.cond, setting.null))
    with setting.device:
        ours, plain = (
            network_of(kind, setting).to(setting.dtype).eval().requires_grad_(False) for kind in ("ours", "plain")
        )
    assert isinstance(ours, DiCo)

    def run(network: nn.Module, kernels: Callable[[Tensor], Any]) -> Callable[[], Tensor]:
        @torch.no_grad()
        def once() -> Tensor:
            c, u = ({"cond": kernels(x["cond"])} for x in (cond, null))
            model_fn = guided(lambda x, t, cond: network(x.to(setting.dtype), t, cond), c, u, guidance)
            if network is ours:
                model_fn = as_cuda_graph(model_fn, setting.noise)
            return sample(DiffusionConfig(), sampler, model_fn, setting.noise, lambda k: setting.noise, True)

        return once

    held = sum(float(p.nbytes) for p in ours.parameters())
    yield Contender("ours", run(ours, ours.text_kernels), setting.batch, held)
    yield Contender("ours, kernels at each step", run(ours, lambda tokens: tokens), setting.batch, held)
    yield Contender("plain", run(plain, lambda tokens: tokens), setting.batch, held)


def text_convolutions(shape: tuple[int, int, int], device: torch.device) -> Iterator[Contender]:
    """text_dwconv forward and backward on (N, H, W, C), against a convolution with N*C groups on (N, C, H, W).

    shape: batch, channels, height and width.
    """
    N, C, H = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, grad = (torch.randn(N, C, H, H, device=device).to(dtype) for _ in range(2))
    context = torch.randn(N, 77, C, device=device).to(dtype).requires_grad_()
    last = torch.channels_last
    cost = Cost(3 * 2 * 81 * x.numel())

    def run(operator: Callable[[Tensor, Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], Any]:
        leaf = x.requires_grad_()
        return lambda: torch.autograd.grad(operator(leaf, context), (leaf, context), grad)

    layouts = x.clone(memory_format=last), grad.clone(memory_format=last)
    yield Contender("ours", run(text_dwconv, *layouts), N, 0.0, cost)
    yield Contender("plain", run(grouped_text_dwconv, x, grad), N, 0.0, cost)


def _objective(network: nn.Module) -> Process:
    """The training loss of a network, which depends on whether it learns the variance; the plain network does."""
    return _OBJECTIVES[network.config.learn_sigma if isinstance(network, Network) else True]


def _compiled(network: nn.Module) -> nn.Module:
    if isinstance(network, Network):
        network.compile_blocks()
    else:
        network.compile()
    return network


def _counted(kind: str, setting: Setting, work: Literal["step", "pass"], released: bool, lower: bool) -> Cost:
    """The cost, traced as an accelerator would run it."""
    ours_in = torch.float32 if released and work == "step" else setting.dtype
    traced = _trace(kind, setting, ours_in, lower)
    if work == "pass":
        return pass_cost(traced, backward=False)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in network_of(kind, setting).parameters())
    return pass_cost(traced, backward=True, more_traffic=optimizer_traffic(parameters, 1))


def trace_step(kind: str, setting: Setting) -> tuple[Pass, int]:
    """The traced forward and backward pass of a training step in bf16, and the number of parameters."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in network_of(kind, setting).parameters())
    return _trace(kind, setting, torch.bfloat16, lower=False), parameters


def _trace(kind: str, setting: Setting, dtype: torch.dtype, lower: bool) -> Pass:
    with torch.device("meta"):
        network = network_of(kind, setting).to("meta", dtype).train()

    def loss() -> Tensor:
        x, noise, t, cond = (v.to("meta") for v in (setting.x, setting.noise, setting.t, setting.cond))
        cond = cond.to(dtype) if cond.is_floating_point() else cond
        losses = _objective(network).training_losses(lambda a, b: network(a, b, cond), x, t, noise)
        return losses["loss"].mean()

    return trace_training(network, loss, autocast=lower)
