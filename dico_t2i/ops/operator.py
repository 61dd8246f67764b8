"""Registers operators with torch.library.

``torch.library.custom_op`` would do the same, but the first call of what it makes imports torch's compiler: more than a
thousand modules and 150 MB in each rank, which training without ``train.compile`` does not need.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

_LIBRARY = torch.library.Library("dico_t2i", "FRAGMENT")
FUNCTIONS: dict[str, Callable[..., Any]] = {}  # what each operator, by its full name, runs
_FORMULAS: dict[Any, Callable[..., int]] = {}


class Operator:
    """An operator ``torch.ops.dico_t2i.<name>``, whose schema is that of a function's annotations."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = f"{_LIBRARY.ns}::{name}"
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(self.name, schema, lib=_LIBRARY, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(self.name, "default", function, lib=_LIBRARY)
        FUNCTIONS[self.name] = function

    def register_fake(self, function: Callable[..., Any]) -> None:
        """Register what says the shapes and dtypes of the results, without computing them."""
        torch.library.register_fake(self.name, function, lib=_LIBRARY)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """Register the gradients, as ``torch.library.register_autograd`` does."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context, lib=_LIBRARY)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function, which must not change its arguments, an operator."""
    return lambda function: Operator(name, function)


def flop_formula(target: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register how many floating-point operations an operator takes: a function of its arguments' shapes."""

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        _FORMULAS[target] = formula
        return formula

    return register


@cache
def flop_formulas() -> Mapping[Any, Callable[..., int]]:
    """The formulas of torch's operators and of this package's, also for torch's ``FlopCounterMode`` from then on.

    The module that has torch's imports Triton, which a rank on CPUs does not need.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for target, formula in _FORMULAS.items():
        register_flop_formula(target)(formula)
    return flop_registry
