"""Every function of a backend on random inputs, against the same in float64 through torch.

``python -m tests.ops.cases MODULE [--long]`` prints the largest errors: so the Triton kernels run where
TRITON_INTERPRET=1 is set before Triton is imported.
"""

import json
import sys
from functools import partial
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from dico_t2i.ops import plain

Tensors = tuple[Tensor | None, ...]


def double(arguments):
    return tuple(a.double() if isinstance(a, Tensor) else a for a in arguments)


def difference(got: Tensors, expected: Tensors) -> float:
    """The largest error of any element, relative to its tensor's largest."""
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.shape == b.shape
            error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)
            worst = max(worst, float(error.nan_to_num(1e9)))
    return worst


def compared(module: ModuleType, name: str, *arguments, found: dict[str, float], exact: ModuleType = plain):
    """What the module's function gives; its error against that of ``exact`` in float64 goes into ``found``."""
    got, expected = getattr(module, name)(*arguments), getattr(exact, name)(*double(arguments))
    got, expected = ((r,) if isinstance(r, Tensor) else r for r in (got, expected))
    found[f"{name}:{len(found)}"] = difference(got, expected)
    return got


def text_errors(module: ModuleType, shape, dtype: torch.dtype, tokens=(77,), kernel=9) -> dict[str, float]:
    """Of the text convolution, for some numbers of tokens."""
    generator = torch.Generator().manual_seed(sum(shape))
    found: dict[str, float] = {}
    x, g = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    for count in tokens:
        context = torch.randn(shape[0], count, shape[-1], generator=generator).to(dtype)
        compared(module, "text_forward", x, context, kernel, g if count == tokens[0] else None, found=found)
        compared(module, "text_backward", x, context, g, kernel, (True, True), found=found)
    return found


def errors(module: ModuleType, shape, dtype: torch.dtype, tokens=(77,)) -> dict[str, float]:
    """Of each function; x (N, H, W, C) and all else but the convolution's weights are of the dtype."""
    N, _, _, C = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size):
        return torch.randn(size, generator=generator).to(dtype)

    run = partial(compared, module, found=(found := {}))
    x, y, g, gate, shift, scale = draw(*shape), draw(*shape), draw(*shape), draw(N, C), draw(N, C), draw(N, C)
    for branch, gated, modulated in (
        (False, False, True),
        (True, True, True),
        (True, False, True),
        (True, True, False),
    ):
        parts = (y if branch else None, gate if gated else None)
        modulation = (shift, scale) if modulated else (None, None)
        residual, _, mean, rstd = run("norm_forward", x, *parts, *modulation)
        source = x if residual is None or gated else residual
        kept = (y, gate) if gated else (None, None)
        again = gated or not branch
        run("norm_backward", source, mean, rstd, *modulation, *kept, y if branch else None, g, again)
    run("scale_forward", x, gate, None)
    run("scale_forward", x, gate, y)
    run("scale_backward", x, gate, g)
    run("gelu_backward", x, g)
    weight, bias = torch.randn(C, 1, 3, 3, generator=generator), torch.randn(C, generator=generator)
    run("depthwise_forward", x, weight, bias)
    run("depthwise_backward", x, weight, bias, g, gate)
    return {**found, **{f"{name} of text": error for name, error in text_errors(module, shape, dtype, tokens).items()}}


def product_errors(module: ModuleType, pixels: int, inputs: int, outputs: int) -> dict[str, float]:
    """Of products with GELU inside; Triton's interpreter has no products in bf16."""
    generator = torch.Generator().manual_seed(pixels)

    def draw(*size):
        return torch.randn(size, generator=generator)

    run = partial(compared, module, found=(found := {}))
    run("linear_gelu_forward", draw(1, pixels, inputs), draw(outputs, inputs), draw(outputs))
    run("gelu_linear_backward", draw(1, pixels, outputs), draw(inputs, outputs), draw(1, pixels, inputs))
    of_two = (2, 1, 128)  # samples and pixels
    run("gate_linear_forward", draw(*of_two, inputs), draw(2, inputs), draw(outputs, inputs), draw(outputs))
    gate = (draw(*of_two, outputs), draw(2, outputs), draw(inputs, outputs))
    run("gate_linear_backward", *gate, draw(*of_two, inputs))
    return found


def main(name: str, long: bool) -> None:
    module = import_module(name)
    found = {
        "float32": errors(module, (2, 3, 5, 24), torch.float32, tokens=()),
        "bfloat16": errors(module, (1, 5, 7, 70), torch.bfloat16, tokens=()),
        "text": errors(module, (1, 3, 2, 70), torch.float32, tokens=(77,)),
        "parts": errors(module, (1, 17, 5, 40), torch.float32, tokens=()),
        "text 3": text_errors(module, (1, 2, 2, 70), torch.float32, (9,), 3),
        "text 5": text_errors(module, (1, 3, 2, 70), torch.float32, (25,), 5),
        "products": product_errors(module, 5, 48, 80),
    }
    if long:
        found |= {
            "wide": errors(module, (1, 2, 10, 3), torch.float32, tokens=(40,)),
            "strips": text_errors(module, (2, 2, 18, 40), torch.float32, (77,)),
            "products of several tiles": product_errors(module, 130, 64, 144),
            "text 11": text_errors(module, (1, 1, 2, 3), torch.float32, (77,), 11),
        }
    print("RESULT" + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], "--long" in sys.argv)
