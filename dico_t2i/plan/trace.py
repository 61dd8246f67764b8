"""Traces the cost of a training step on an accelerator by running it on the meta device, where nothing is computed."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dico_t2i.ops import PRODUCTS, flop_formulas, linear

aten = torch.ops.aten

_ALLOCATIONS = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)


class Call(NamedTuple):
    """An operation: the name of its operator, such as aten::mm, and the shapes of its tensors."""

    operator: str
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Pass:
    """The operations of one forward and backward pass, in order; each array is (operations,).

    products: floating-point operations of matrix products and dense convolutions. others: those of depthwise
    convolutions. traffic: bytes read and written. live: bytes of all tensors that exist while the operation runs,
    without parameters and completed gradients. gradients: the number of elements of the parameter gradients completed
    so far. forward: how many of the operations belong to the forward pass. calls: what each operation was called with.
    kept: of the bytes that the forward pass keeps for the backward pass, those made by each operator.
    """

    forward: int
    calls: tuple[Call, ...]
    kept: Mapping[str, int]
    products: np.ndarray
    others: np.ndarray
    traffic: np.ndarray
    live: np.ndarray
    gradients: np.ndarray

    @property
    def activations(self) -> float:
        """Bytes that the forward pass keeps for the backward pass, with inputs and losses."""
        return float(self.live[self.forward - 1])


def trace_training(network: nn.Module, loss_of: Callable[[], Tensor], *, autocast: bool = False) -> Pass:
    """Trace one forward and backward pass.

    network: its parameters are on the meta device. loss_of: computes the loss of a batch with the network, from inputs
    on the meta device. autocast: imitate torch.autocast to bfloat16 on CUDA, which the meta device lacks. Attention
    counts as a fused kernel. Workspaces inside kernels and copies to other layouts are unknown and not counted.
    """
    parameters = list(network.parameters())
    recorder = _Recorder(parameters)
    hooks = [p.register_post_accumulate_grad_hook(recorder.take_gradient) for p in parameters if p.requires_grad]
    with _as_on_cuda(autocast), recorder:
        loss = loss_of()
        forward, kept = len(recorder.rows), recorder.kept()
        loss.backward()
    for hook in hooks:
        hook.remove()
    return Pass(forward, tuple(recorder.calls), kept, *np.array(recorder.rows, dtype=np.float64).T)


class _Seen(NamedTuple):
    """The cost of an operation on inputs of given shapes and layouts.

    outputs creates new outputs; it is None for views and in-place operations.
    """

    call: Call
    products: float
    others: float
    traffic: float
    outputs: Callable[[], Any] | None


class _Recorder(TorchDispatchMode):
    """Records a row with the columns of ``Pass`` for each operation: its work, its traffic and the memory in use."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.rows: list[tuple[float, float, float, float, float]] = []
        self.calls: list[Call] = []
        self.live = 0
        self.gradients = 0
        self._held = {id(p.untyped_storage()): weakref.ref(p.untyped_storage()) for p in parameters}
        self._made: dict[int, tuple[str, int]] = {}  # operator and bytes of the storages that are not parameters
        self._seen: dict[Any, _Seen] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = (func, *map(_form, tree_leaves((args, kwargs))))
        seen = self._seen.get(key)
        if seen is None or seen.outputs is None:
            out = _as_laid_out(func, args, func(*args, **kwargs))
        else:
            out = seen.outputs()  # takes a tenth of the time, and most blocks are alike
        if seen is None:
            seen = self._seen[key] = _look_at(func, args, kwargs, out)
        for tensor in _tensors(out):
            self._hold(tensor.untyped_storage(), seen.call.operator)
        self.calls.append(seen.call)
        self.rows.append((seen.products, seen.others, seen.traffic, self.live, self.gradients))
        return out

    def kept(self) -> Counter[str]:
        """Bytes that exist now, by the operator that made them."""
        total: Counter[str] = Counter()
        for operator, size in self._made.values():
            total[operator] += size
        return total

    def take_gradient(self, parameter: Tensor) -> None:
        """Count a completed gradient and free it."""
        self.gradients += parameter.numel()
        parameter.grad = None

    def _hold(self, storage: torch.UntypedStorage, operator: str) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._held:
            return

        def release(_: Any) -> None:
            del self._held[key], self._made[key]
            self.live -= size

        self._held[key], self._made[key] = weakref.ref(storage, release), (operator, size)
        self.live += size


@contextmanager
def _as_on_cuda(autocast: bool) -> Iterator[None]:
    """Replace the functions that behave differently on CUDA than on the meta device: fused attention and autocast.

    A torch function mode would not be active when the backward pass recomputes activations.
    """
    rules: dict[tuple[Any, str], Callable[..., Any]] = {(F, "scaled_dot_product_attention"): _fused_attention}
    if autocast:
        rules |= {(F, name): _cast(getattr(F, name), torch.bfloat16) for name in ("linear", "conv2d")}
        rules |= {(F, "scaled_dot_product_attention"): _cast(_fused_attention, torch.bfloat16)}
        rules |= {(torch, "cat"): _cast(torch.cat, None)}
        rules |= {(linear, "working_dtype"): lambda x: torch.bfloat16}
    usual = {place: getattr(*place) for place in rules}
    try:
        for place, function in rules.items():
            setattr(*place, function)
        yield
    finally:
        for place, function in usual.items():
            setattr(*place, function)


def _fused_attention(*args: Any, **kwargs: Any) -> Tensor:
    return aten._scaled_dot_product_flash_attention_for_cpu(*args, **kwargs)[0]


def _cast(function: Callable[..., Any], dtype: torch.dtype | None) -> Callable[..., Any]:
    """The function with its tensors converted to a dtype, except masks; None stands for the widest of their dtypes."""

    def cast(*args: Any, **kwargs: Any) -> Any:
        wanted = dtype or reduce(torch.promote_types, (t.dtype for t in _tensors((args, kwargs))))
        args, kwargs = tree_map_only(Tensor, lambda t: t if t.dtype == torch.bool else t.to(wanted), (args, kwargs))
        return function(*args, **kwargs)

    return cast


def _look_at(func: Any, args: Any, kwargs: Any, out: Any) -> _Seen:
    inputs, outputs = _tensors((args, kwargs)), _tensors(out)
    old = {id(t.untyped_storage()) for t in inputs}
    new = not func._schema.is_mutable and not any(id(t.untyped_storage()) in old for t in outputs)
    traffic = sum(map(_extent, inputs + outputs))
    if (inputs and not new and not func._schema.is_mutable) or func._overloadpacket in _ALLOCATIONS:
        traffic = 0  # a view, or only an allocation
    call = Call(func._schema.name, tuple(tuple(t.shape) for t in inputs))
    return _Seen(call, *_work(func, args, kwargs, out), traffic, _maker(out) if new and outputs else None)


def _maker(out: Any) -> Callable[[], Any]:
    """A function that creates outputs of the same shapes, strides and dtypes."""
    if isinstance(out, Tensor):
        shape, stride, dtype = out.shape, out.stride(), out.dtype
        return lambda: torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    makers = [_maker(part) if isinstance(part, Tensor) else lambda: None for part in out]
    return lambda: tuple(make() for make in makers)


def _work(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[float, float]:
    """Floating-point operations of matrix products and dense convolutions, and of depthwise convolutions."""
    if func is aten.convolution.default:
        flops, grouped = 2 * out.numel() * args[1][0].numel(), args[8] > 1
    elif func is aten.convolution_backward.default:
        flops, grouped = 2 * args[0].numel() * args[2][0].numel() * sum(args[10][:2]), args[9] > 1
    elif func._overloadpacket in flop_formulas():
        flops = flop_formulas()[func._overloadpacket](*args, **kwargs, out_val=out)
        grouped = func.namespace == "dico_t2i" and func._overloadpacket not in PRODUCTS
    else:
        return 0, 0
    return (0, flops) if grouped else (flops, 0)


def _as_laid_out(func: Any, args: Any, out: Any) -> Any:
    """Make the output of convolutions channels-last if the input is, which the meta device does not do."""
    if func is aten.convolution.default and _channels_last(args[0]):
        return out.contiguous(memory_format=torch.channels_last)
    if func is aten.convolution_backward.default and out[0] is not None and _channels_last(args[1]):
        return (out[0].contiguous(memory_format=torch.channels_last), *out[1:])
    return out


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _extent(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: expanded dimensions count once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


def _form(leaf: Any) -> Any:
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_meta]
