"""Training steps on tensors that claim to be on a GPU: nothing is computed, but each operation is seen.

The network, the loss, the random draws and the optimizer go through torch's fake tensors, and the operators through
``dico_t2i.ops.kernels``, of which only the start of a kernel is left out. What this cannot see: DeepSpeed, streams, the
loading of data, the values, and what torch's own kernels do inside. torch's backward engine needs a real device, so the
graph is walked here.
"""

from collections import defaultdict
from contextlib import contextmanager, suppress

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dico_t2i import randomness
from dico_t2i.config import DiCoConfig, DiffusionConfig, OptimizerConfig
from dico_t2i.diffusion import build
from dico_t2i.models import build_network
from dico_t2i.ops import backend
from dico_t2i.ops.operator import FUNCTIONS
from dico_t2i.training.optimizer import AdamWEMA

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward)
SIZES = {"hidden_size": 32, "depths": (1, 1, 1, 1, 1), "mlp_ratio": 2.0, "num_classes": 10, "pooled_text": False}
BATCH = 4


class Watch(TorchDispatchMode):
    """Notes what costs time on a GPU: waits of the host, pageable copies, operators through torch, fp32 for bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.kernels: list[str] = []
        self.pinned: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = tensors_of((args, kwargs))
        if func is aten._local_scalar_dense.default and tensors[0].is_cuda:
            self.faults.append("the host waits for a value")
            return 0.0
        if func.namespace == "dico_t2i":
            return self._operator(func, args, kwargs)
        if func._overloadpacket in PRODUCTS and any(t.dtype == torch.float32 for t in tensors if t.is_cuda):
            self.faults.append(f"{func}: a product in fp32")
        out = func(*args, **kwargs)
        if func._overloadpacket in (aten._to_copy, aten.copy_):
            self._copy(func, tensors[-1], out, kwargs.get("non_blocking", len(args) > 2 and args[2]))
        return out

    def _operator(self, func, args, kwargs):
        """Run what the operator does on a GPU, and compare its outputs with those that it declares."""
        if any(t.dtype == torch.float32 for t in tensors_of(args) if t.ndim == 4):
            self.faults.append(f"{func}: images in fp32")
        before = len(self.kernels)
        with self:
            out = FUNCTIONS[func._schema.name](*args, **kwargs)
        if len(self.kernels) == before:
            self.faults.append(f"{func}: falls back to torch")
        if forms(out) != forms(func(*args, **kwargs)):
            self.faults.append(f"{func}: declares other outputs")
        return out

    def _copy(self, func, source, out, non_blocking):
        if source.is_cuda and not out.is_cuda:
            self.faults.append(f"{func}: the host waits for a copy")
        elif out.is_cuda and not source.is_cuda and not (non_blocking and any(source is p for p in self.pinned)):
            self.faults.append(f"{func}: a pageable copy to the device")


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def forms(tree):
    return [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors_of(tree)]


@pytest.fixture
def gpu(monkeypatch):
    """A function that begins to watch: a context."""
    jit = pytest.importorskip("triton.runtime.jit")
    monkeypatch.delenv(backend.OPERATORS, raising=False)
    monkeypatch.setattr(backend, "find_triton", lambda: True)
    monkeypatch.setattr("dico_t2i.ops.linear.has_wide_products", lambda: True)

    @contextmanager
    def watched():
        with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
            monkeypatch.setattr(jit.JITFunction, "run", lambda kernel, *a, **k: watch.kernels.append(kernel.__name__))
            yield watch

    return watched


@torch.no_grad()
def backward(loss):
    """``loss.backward()``, without the engine."""
    edges = defaultdict(int)
    found, seen = [loss.grad_fn], set()
    while found:
        node = found.pop()
        if node not in seen:
            seen.add(node)
            after = [child for child, _ in node.next_functions if child is not None]
            for child in after:
                edges[child] += 1
            found += after
    gradients, ready = defaultdict(dict), [loss.grad_fn]
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    while ready:
        node = ready.pop()
        after = [(child, slot) for child, slot in node.next_functions if child is not None]
        for result, (child, slot) in zip(results_of(node, gradients.pop(node, {})), after, strict=True):
            if result is not None:
                like = child._input_metadata[slot]  # the engine sums over broadcast dimensions, and converts
                result = result.sum_to_size(like.shape).to(like.dtype)
                held = gradients[child].get(slot)
                gradients[child][slot] = result if held is None else held + result
            edges[child] -= 1
            if not edges[child]:
                ready.append(child)


def results_of(node, given):
    """The gradients that a node passes on to each of its next ones, from those that it was given by position."""
    wanted = [child is not None for child, _ in node.next_functions]
    if not given:
        return (None,) * sum(wanted)
    if hasattr(node, "variable"):
        leaf = node.variable
        leaf.grad = given[0].to(leaf.dtype) if leaf.grad is None else leaf.grad + given[0]
        return ()
    gradients = [given.get(slot) for slot in range(len(node._input_metadata))]
    if hasattr(node, "apply"):  # written in Python: its results are those of all arguments, not of tensors alone
        wanted, results = node.needs_input_grad, node.apply(*gradients)
    else:
        results = node(*gradients)
    results = results if isinstance(results, tuple) else (results,)
    return [result for result, want in zip(results, wanted, strict=True) if want]


class Step:
    """A step with the precisions and options that the engine and the trainer use on a GPU with bf16."""

    def __init__(self, condition, watch):
        config = DiCoConfig(condition=condition, text_dim=32, **SIZES)
        self.watch, self.condition = watch, condition
        with torch.device("meta"):
            self.network = build_network(config).train()
        for module in self.network.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    empty = torch.empty(weight.shape, dtype=torch.bfloat16, device="cuda")
                    module._parameters[name] = nn.Parameter(empty)
        self.masters = [nn.Parameter(weight.detach().float()) for weight in self.network.parameters()]
        self.optimizer = AdamWEMA(self.masters, OptimizerConfig(ema=(0.99,)))
        self.optimizer.deferred = True
        self.optimizer.veto = lambda: torch.zeros((), dtype=torch.bool, device="cuda")
        self.process = build(DiffusionConfig(), config.learn_sigma)

    def __call__(self):
        positions = torch.arange(BATCH)
        self.watch.pinned.append(positions)  # as the loader's are
        positions = positions.to("cuda", non_blocking=True)
        latents = randomness.normal(0, "latent", positions, (4, 8, 8))
        noise = randomness.normal(0, "noise", positions, (4, 8, 8))
        t = self.process.draw_timesteps(0, positions)
        cond = torch.zeros(BATCH, dtype=torch.int64, device="cuda")
        if self.condition == "text":
            cond = torch.zeros(BATCH, 77, 32, dtype=torch.bfloat16, device="cuda")
        losses = self.process.training_losses(lambda x, time: self.network(x, time, cond), latents, t, noise)
        backward(losses["loss"].mean())
        for master, weight in zip(self.masters, self.network.parameters(), strict=True):
            assert weight.grad is not None
            assert weight.grad.dtype == torch.bfloat16
            master.grad, weight.grad = weight.grad.float(), None
        self.optimizer.step()


@pytest.mark.parametrize("condition", ["text", pytest.param("class", marks=pytest.mark.long)])
def test_a_step_neither_waits_nor_falls_back(gpu, condition):
    """The second one: in the first, tables and the optimizer's state are made."""
    with gpu() as watch:
        step = Step(condition, watch)
        step()
        assert not any("fp32" in fault or "falls" in fault for fault in watch.faults)
        watch.faults.clear()
        watch.kernels.clear()
        step()
    assert watch.faults == []
    text = {"_text_pack", "_text_forward", "_text_taps"} if condition == "text" else set()
    assert set(watch.kernels) == text | {
        *("_norm_forward", "_norm_backward", "_scale_forward", "_scale_backward"),
        *("_linear_gelu", "_gelu_linear_backward"),  # a gate is in a product from 128 pixels on
        *("_depthwise_forward", "_depthwise_slope", "_depthwise_backward"),
    }


def spoil(network):
    """Add a wait, a copy from pageable memory, and with it fp32 for all that follows."""
    network.stem.register_forward_hook(lambda layer, inputs, out: out * float(out.float().mean().item() * 0 + 1))
    network.stem.register_forward_hook(lambda layer, inputs, out: out * torch.ones(1).to("cuda"))


def test_each_fault_is_found(gpu, monkeypatch):
    monkeypatch.setenv(backend.OPERATORS, "torch")
    with gpu() as watch:
        step = Step("class", watch)
        spoil(step.network)
        with suppress(AssertionError, RuntimeError):  # what is spoilt need not get through the step
            step()
    for fault in ("waits for a value", "a pageable copy", "falls back", "a product in fp32", "images in fp32"):
        assert any(fault in found for found in watch.faults), (fault, watch.faults)
