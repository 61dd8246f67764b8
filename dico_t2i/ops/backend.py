"""Which implementation of the operators a tensor gets.

Three modules have the same functions: ``plain`` (torch), ``native`` (C, on the CPU) and ``kernels`` (Triton, on GPUs).
They take contiguous (N, H, W, C) tensors and (N, C) vectors, each in any floating dtype, sum in float32, and give each
gradient in its input's dtype; an argument that is None is a part that is not there, and so is its gradient.
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
    """float64 through torch; else Triton for CUDA, C for the CPU where a compiler is, and torch for all else.

    DICO_OPERATORS=torch in the environment sends everything through torch.
    """
    if x.dtype == torch.float64 or os.environ.get(OPERATORS) == "torch":
        return plain
    if x.is_cuda and find_triton():
        from dico_t2i.ops import kernels

        return kernels
    return native if x.device.type == "cpu" and native.library() is not None else plain


@cache
def find_triton() -> bool:
    return find_spec("triton") is not None


def present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """An operator of torch.library returns tensors only: empty ones stand for what is not there."""
    return tuple(torch.empty(0) if tensor is None else tensor for tensor in tensors)
