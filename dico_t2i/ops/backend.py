"""Chooses the implementation of the operators for a tensor.

Three modules have the same functions: ``plain`` (torch), ``native`` (C, on the CPU) and ``kernels`` (Triton, on GPUs);
those of products, which are used on GPUs alone, are not in ``native``.
The recurrences along tokens are in ``plain_scans``, ``native_scans`` and ``kernels_scans``. The functions take
contiguous tensors in any floating dtype, (N, H, W, C) and (N, C) or tokens (N, L, ...), and sum in float32. Each
gradient has the dtype of its input. An argument that is None leaves out that part of the operator, and its gradient is
None as well.
"""

import logging
import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from dico_t2i.ops import native, native_scans, plain, plain_scans

OPERATORS = "DICO_OPERATORS"

logger = logging.getLogger(__name__)


def backend(x: Tensor) -> ModuleType:
    """The module to use: torch for float64, Triton on CUDA, C on a CPU with a compiler, and torch otherwise.

    DICO_OPERATORS=torch in the environment selects torch for everything.
    """
    way = _way(x)
    return _kernels("kernels") if way == "triton" else native if way == "c" else plain


def scan_backend(x: Tensor) -> ModuleType:
    """The same choice for recurrences along tokens."""
    way = _way(x)
    return _kernels("kernels_scans") if way == "triton" else native_scans if way == "c" else plain_scans


def _way(x: Tensor) -> Literal["torch", "triton", "c"]:
    if x.dtype == torch.float64 or os.environ.get(OPERATORS) == "torch":
        return "torch"
    if x.is_cuda and find_triton():
        return "triton"
    return "c" if x.device.type == "cpu" and native.library() is not None else "torch"


@cache
def _kernels(name: str) -> ModuleType:
    """Triton is imported where it is used."""
    return import_module(f"dico_t2i.ops.{name}")


@cache
def find_triton() -> bool:
    """Whether Triton is installed and can start kernels, for which it builds a module with the host's C compiler."""
    if find_spec("triton") is None:
        return False
    try:
        import_module("triton.runtime").driver.active.get_current_device()
    except Exception as error:  # of many kinds: no compiler, no headers of Python, no place to write
        logger.warning(
            "Triton cannot start kernels (%s), so the operators run through torch alone, which is slow", error
        )
        return False
    return True


@cache
def has_wide_products() -> bool:
    """Whether the GPU multiplies from shared memory (``wgmma``, compute capability 9 or more).

    On older ones, operands take registers, and those of a product with GELU or a gate inside would go to memory.
    Without a GPU, tensors on one are fake, and stand for such a GPU.
    """
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)


def working_dtype(x: Tensor) -> torch.dtype:
    """autocast's dtype if it is enabled, so that forward and backward use the same one, else that of x."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Replace None by an empty tensor, since an operator of torch.library must return tensors."""
    return tuple(torch.empty(0) if tensor is None else tensor for tensor in tensors)
