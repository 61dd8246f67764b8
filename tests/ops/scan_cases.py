"""Both recurrences of a backend on random inputs, against the same in float64 through torch.

``python -m tests.ops.scan_cases MODULE`` prints the largest errors: so the Triton kernels run where TRITON_INTERPRET=1
is set before Triton is imported.
"""

import json
import sys
from functools import partial
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F

from dico_t2i.ops import plain_scans
from tests.ops.cases import compared


def attention_inputs(shape, strength: float, dtype: torch.dtype):
    """q, k, v, gates of shape (N, L, H, K, V); a strength of 1/16 is DiG's, one of 30 makes every gate shut."""
    N, L, H, K, V = shape
    generator = torch.Generator().manual_seed(sum(shape))
    q, k, gates, v = (torch.randn(N, L, H, width, generator=generator, dtype=torch.float64) for width in (K, K, K, V))
    return [tensor.to(dtype) for tensor in (q, k, v, strength * F.logsigmoid(gates))]


def scan_inputs(shape, step: float, dtype: torch.dtype):
    """The eight tensors of shape (N, L, E, n); dt is about softplus(step)."""
    N, L, E, n = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    u, delta, A = draw(N, L, E), step + draw(N, L, E), -torch.exp(draw(E, n))
    tensors = (u, delta, A, draw(N, L, n), draw(N, L, n), draw(E), draw(N, L, E), draw(E))
    return [tensor.to(dtype) for tensor in tensors]


def attention_errors(module: ModuleType, shape, strength: float, dtype: torch.dtype) -> dict[str, float]:
    run = partial(compared, module, exact=plain_scans, found=(found := {}))
    inputs = attention_inputs(shape, strength, dtype)
    out, state = run("gla_forward", *inputs)
    run("gla_backward", *inputs, state, out.flip(1), None)
    run("gla_backward", *inputs, state, out.flip(1), state.flip(2))
    return found


def scan_errors(module: ModuleType, shape, step: float, dtype: torch.dtype) -> dict[str, float]:
    run = partial(compared, module, exact=plain_scans, found=(found := {}))
    u, delta, A, *rest = scan_inputs(shape, step, dtype)
    inputs = (u, delta, A.T.contiguous(), *rest)
    for backwards in (False, True):
        out, states = run("scan_forward", *inputs, backwards)
        run("scan_backward", *inputs, states, out.flip(1), backwards)
    return found


def main(name: str) -> None:
    module, single, half = import_module(name), torch.float32, torch.bfloat16
    found = {
        "attention": attention_errors(module, (2, 20, 1, 8, 20), 1 / 16, single),
        "strong gates": attention_errors(module, (1, 17, 2, 5, 3), 30, single),
        "strong gates, torch": attention_errors(plain_scans, (1, 17, 2, 5, 3), 30, single),
        "bfloat16 attention": attention_errors(module, (1, 3, 1, 4, 5), 1, half),
        "scan": scan_errors(module, (1, 33, 3, 2), 0, single),
        "large steps": scan_errors(module, (1, 5, 17, 1), 6, single),
        "bfloat16 scan": scan_errors(module, (1, 7, 3, 1), -4, half),
    }
    print("RESULT" + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
