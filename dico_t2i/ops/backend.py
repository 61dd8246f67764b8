"""Chooses the implementation of the operators for a tensor.

Three modules have the same functions: ``plain`` (torch), ``native`` (C, on the CPU) and ``kernels`` (Triton, on GPUs).
They take contiguous (N, H, W, C) tensors and (N, C) vectors, each in any floating dtype, and sum in float32. Each
gradient has the dtype of its input. An argument that is None leaves out that part of the operator, and its gradient is
None as well.
"""

import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from dico_t2i.ops import native, plain

OPERATORS = "DICO_OPERATORS"


def backend(x: Tensor) -> ModuleType:
    """The module to use: torch for float64, Triton on CUDA, C on a CPU with a compiler, and torch otherwise.

    DICO_OPERATORS=torch in the environment selects torch for everything.
    """
    if x.dtype == torch.float64 or os.environ.get(OPERATORS) == "torch":
        return plain
    if x.is_cuda and find_triton():
        from dico_t2i.ops import kernels

        return kernels
    return native if x.device.type == "cpu" and native.library() is not None else plain


@cache
def find_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Replace None by an empty tensor, since an operator of torch.library must return tensors."""
    return tuple(torch.empty(0) if tensor is None else tensor for tensor in tensors)
