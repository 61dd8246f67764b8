"""Time each operator of dico_t2i.ops against the same computation in plain torch, forward and forward + backward.

    python evals/operators.py                        the shapes of DiCo-S and XL, batch 8
    python evals/operators.py --only text_dwconv --threads 2 --json operators.json
    python evals/operators.py --threads 1 --cpu-time  on a machine that others use too

The recurrences along tokens are compared with a loop over 256 tokens, for the width of DiG-S and DiT-S. Numbers are
float32 on a CPU, bfloat16 on a GPU (--device cuda). Baseline and operator take turns. Shown are medians and, for the
ratio, the range from the first to the third quartile. On a CPU each operator runs through the C library and through
torch alone.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from dico_t2i import ops
from dico_t2i.command import run, script_parser
from dico_t2i.ops import native, reference
from evals.speed.measure import SHAPES
from evals.speed.plain_dico import grouped_text_dwconv

TOKENS = 77
SEQUENCES = ((384, 16),)  # channels, height and width of a grid of tokens


class Operator(NamedTuple):
    """An operator.

    inputs: one letter each: x (N, H, W, C), v (N, C), c (N, 77, C), w (C, 1, 3, 3), b (C,). For the recurrences, with L
    tokens: k and h (N, L, C / 64, 32 or 64), u (N, L, 2C), s (N, L, 16), A (2C, 16) and e (2C,).
    """

    inputs: str
    ours: Callable[..., Any]
    baseline: Callable[..., Any]
    shapes: tuple[tuple[int, int], ...] = SHAPES


def text_groups(x: Tensor, context: Tensor) -> Tensor:
    """The method of the released code: a convolution of N * C groups, on planes."""
    return grouped_text_dwconv(x.permute(0, 3, 1, 2), context).permute(0, 2, 3, 1).contiguous()


def text_ours(x: Tensor, context: Tensor) -> Tensor:
    return ops.text_dwconv(x.permute(0, 3, 1, 2), context).permute(0, 2, 3, 1)


def norm_steps(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    gate, shift, scale = (v[:, None, None] for v in (gate, shift, scale))
    x = x + gate * branch
    return x, F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def depthwise_steps(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    planes = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[-1])
    out = F.gelu(planes.permute(0, 2, 3, 1))
    return out, out.mean((1, 2))


def with_gates(attention: Callable[..., Any]) -> Callable[..., Any]:
    """The operator with DiG's gates."""
    return lambda q, k, v, gates: attention(q, k, v, F.logsigmoid(gates) / 16)


def with_rates(scan: Callable[..., Any]) -> Callable[..., Any]:
    """The operator with Mamba's rates, which are negative."""
    return lambda u, delta, A, *others: scan(u, delta, -A.exp(), *others)


OPERATORS = {
    "text_dwconv": Operator("xc", text_ours, text_groups),
    "residual_norm_modulate": Operator("xxvvv", ops.residual_norm_modulate, norm_steps),
    "depthwise3x3_gelu_pool": Operator("xwb", ops.depthwise3x3_gelu_pool, depthwise_steps),
    "channel_scale": Operator("xv", ops.channel_scale, lambda x, v: x * v[:, None, None]),
    "gated_residual": Operator("xvx", ops.gated_residual, lambda x, v, y: x + v[:, None, None] * y),
    "gated_linear_attention": Operator(
        "kkhk", with_gates(ops.gated_linear_attention), with_gates(reference.gated_linear_attention), SEQUENCES
    ),
    "selective_scan": Operator(
        "uuAsseue", with_rates(ops.selective_scan), with_rates(reference.selective_scan), SEQUENCES
    ),
}


def make_inputs(letters: str, batch: int, channels: int, size: int, device: str) -> list[Tensor]:
    shapes = {
        "x": (batch, size, size, channels),
        "v": (batch, channels),
        "c": (batch, TOKENS, channels),
        "w": (channels, 1, 3, 3),
        "b": (channels,),
        "k": (batch, size * size, channels // 64, 32),
        "h": (batch, size * size, channels // 64, 64),
        "u": (batch, size * size, 2 * channels),
        "s": (batch, size * size, 16),
        "A": (2 * channels, 16),
        "e": (2 * channels,),
    }
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [torch.randn(shapes[k], device=device, dtype=dtype, requires_grad=True) for k in letters]


@contextmanager
def implementation(compiled: bool) -> Iterator[None]:
    """Use the C library, or torch alone."""
    before = os.environ.get("DICO_NO_COMPILER")
    os.environ["DICO_NO_COMPILER"] = "0" if compiled else "1"
    native.library.cache_clear()
    try:
        yield
    finally:
        os.environ.pop("DICO_NO_COMPILER")
        if before is not None:
            os.environ["DICO_NO_COMPILER"] = before
        native.library.cache_clear()


def forward(function: Callable[..., Any], inputs: list[Tensor]) -> None:
    with torch.inference_mode():
        function(*inputs)


def forward_backward(function: Callable[..., Any], inputs: list[Tensor]) -> None:
    out = function(*inputs)
    out = (out,) if isinstance(out, Tensor) else out
    torch.autograd.grad(out, inputs, [torch.ones_like(o) for o in out])


def milliseconds(work: Callable[[], None], clock: Callable[[], float], device: str) -> float:
    start = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) * 1e3


def compare(
    operator: Operator, shape: tuple[int, int], run: Callable[..., None], compiled: bool, options: argparse.Namespace
) -> dict[str, float]:
    """Medians of baseline and operator, which take turns, and quartiles of their ratio."""
    inputs = make_inputs(operator.inputs, options.batch, *shape, options.device)
    clock = time.process_time if options.cpu_time else time.perf_counter
    pairs = []
    with implementation(compiled):
        for _ in range(options.repeats + 1):
            pairs.append(
                [
                    milliseconds(lambda f=f: run(f, inputs), clock, options.device)  # type: ignore[misc]
                    for f in (operator.baseline, operator.ours)
                ]
            )
    baseline, ours = map(statistics.median, zip(*pairs[1:], strict=True))
    quartiles = statistics.quantiles((a / b for a, b in pairs[1:]), n=4)
    return {"baseline_ms": baseline, "ours_ms": ours, "ratio": quartiles[1], "low": quartiles[0], "high": quartiles[2]}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    ways = ("triton",) if options.device == "cuda" else ("c", "torch")
    if "c" in ways and native.library() is None:
        ways = ("torch",)
    cases = [
        (name, shape, run, way)
        for name in options.only or OPERATORS
        for shape in OPERATORS[name].shapes
        for run in (forward, forward_backward)
        for way in ways
    ]
    return [
        {"operator": name, "channels": shape[0], "size": shape[1], "pass": run.__name__, "implementation": way}
        | compare(OPERATORS[name], shape, run, way != "torch", options)
        for name, shape, run, way in track(cases, "operators")
    ]


def table(rows: list[dict[str, Any]], title: str) -> Table:
    shown = Table(title=title)
    for name in ("operator", "shape", "pass", "through", "torch, ms", "ours, ms", "ratio"):
        shown.add_column(name, justify="left" if name in ("operator", "pass", "through") else "right")
    for row in rows:
        shown.add_row(
            row["operator"],
            f"{row['channels']}@{row['size']}",
            row["pass"].replace("_", " + "),
            row["implementation"],
            f"{row['baseline_ms']:.2f}",
            f"{row['ours_ms']:.2f}",
            f"{row['ratio']:.1f} ({row['low']:.1f} to {row['high']:.1f})",
        )
    return shown


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=OPERATORS, help="only these operators (default: all)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9, help="pairs of measurements for each median")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time instead of wall clock")
    parser.add_argument("--json", type=Path, help="JSON file for the numbers")
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error("--repeats: 2 or more")
    torch.set_num_threads(options.threads)
    rows = measure(options)
    clock = "processor time" if options.cpu_time else "wall clock"
    title = f"batch {options.batch}, {options.device}, {options.threads} threads, {clock}"
    Console(width=120).print(table(rows, title))
    if options.json:
        options.json.write_text(json.dumps({"title": title, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
