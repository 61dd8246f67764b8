"""Compile the operators' kernels for a GPU and count what they take; no GPU is needed, and nothing is timed.

    python evals/gpu_code.py                          all operators, the shapes of DiCo-S, XL and H, bf16, for an H200
    python evals/gpu_code.py --only depthwise text --dtype float32 --gpu A100

Each row is a kernel at a shape (channels@side). Stack: bytes of registers that did not fit. Warps: those that a
multiprocessor holds at once. Loads: their number in the program, by bytes in a thread. Loop: instructions of the
innermost loop; of them multiply-adds. Issue: the time to start all instructions of all programs, one a clock on each
scheduler. Bytes: the time to move each tensor once at the rate of the GPU's memory. Both are computed.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from dico_t2i.command import positive, run, script_parser
from dico_t2i.ops import kernels
from dico_t2i.ops.linear import PIXELS, WIDEST
from evals.speed.machine_code import MACHINES, Launch, Machine, launches
from evals.speed.measure import SHAPES

TOKENS, SIDE = 77, 9  # of the text convolution
COLUMNS = ("kernel", "registers", "stack", "warps", "loads", "loop", "multiply-adds", "issue, ms", "bytes, ms", "ratio")


def calls(channels: int, side: int, batch: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """The functions of ``dico_t2i.ops.kernels`` by name, each ready to be called with tensors without data.

    Those of products are there where the network uses them at this shape.
    """

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, vector, weight, bias = (
        empty(*shape) for shape in ((batch, side, side, channels), (batch, channels), (channels, 1, 3, 3), (channels,))
    )
    wide = empty(batch, side, side, 2 * channels)  # the feed-forward's hidden layer
    tokens, statistic = empty(batch, TOKENS, channels), empty(batch, side, side, dtype=torch.float32)
    modulated = (vector, vector, vector)
    up, down = empty(2 * channels, channels), empty(channels, 2 * channels)
    square = empty(channels, channels)
    gelu_products: dict[str, Callable[[], Any]] = {
        "GELU product forward": partial(kernels.linear_gelu_forward, x, up, empty(2 * channels)),
        "GELU product backward": partial(kernels.gelu_linear_backward, wide, down, x),
    }
    gate_products: dict[str, Callable[[], Any]] = {
        "gate product forward": partial(kernels.gate_linear_forward, x, vector, square, bias),
        "gate product backward": partial(kernels.gate_linear_backward, x, vector, square, x),
    }
    fused = dtype == torch.bfloat16 and channels <= WIDEST
    return {
        "norm forward": partial(kernels.norm_forward, x, x, *modulated),
        "norm backward": partial(kernels.norm_backward, x, statistic, statistic, vector, vector, x, vector, x, x, True),
        "factor forward": partial(kernels.scale_forward, x, vector, x),
        "factor backward": partial(kernels.scale_backward, x, vector, x),
        "GELU backward": partial(kernels.gelu_backward, wide, wide),
        "depthwise forward": partial(kernels.depthwise_forward, x, weight, bias),
        "depthwise backward": partial(kernels.depthwise_backward, x, weight, bias, x, vector),
        "text forward": partial(kernels.text_forward, x, tokens, SIDE, x),
        "text backward": partial(kernels.text_backward, x, tokens, x, SIDE, (False, True)),
        **(gelu_products if fused else {}),
        **(gate_products if fused and side**2 % PIXELS == 0 else {}),
    }


def trips(launch: Launch) -> tuple[int, ...]:
    """How often the nested loops of a launch run, from the outermost to the innermost."""
    a = launch.arguments
    match launch.name.strip("_").split("_"):
        case ["norm" | "scale" | "gelu", _]:
            return (-(-min(a["chunk_pixels"], a["pixels"]) // a["ROWS"]),)
        case ["linear", "gelu"] | ["gelu", "linear", _] | ["gate", "linear", *_]:
            return (-(-a["K"] // a["INNER"]),)
        case ["depthwise", "backward"]:
            return (a["rows_each"] + 2,)
        case ["depthwise", _]:
            return (a["rows_each"],)
        case ["text", "forward"]:
            return (a["H"],)
        case ["text", "taps"]:
            return (-(-min(a["columns_each"], a["W"]) // a["PIXELS"]), -(-a["H"] // a["ROWS"]))
    return ()


class Row(NamedTuple):
    """A kernel at a shape. Seconds are computed from counts."""

    operator: str
    kernel: str
    shape: str
    registers: int
    stack: int
    warps: int
    loads: dict[int, int]
    loop: int
    multiply_adds: int
    issue_s: float
    bytes_s: float

    @property
    def useful(self) -> float:
        """The share of multiply-adds in the innermost loop."""
        return self.multiply_adds / self.loop

    @property
    def ratio(self) -> float:
        return self.issue_s / self.bytes_s

    def cells(self) -> Iterator[str]:
        """Those of COLUMNS."""
        yield f"{self.kernel} {self.shape}"
        yield from map(str, (self.registers, self.stack, self.warps))
        yield ", ".join(f"{count} of {size}" for size, count in sorted(self.loads.items(), reverse=True))
        yield from (str(self.loop), f"{self.useful:.0%}")
        yield from (f"{1e3 * self.issue_s:.3f}", f"{1e3 * self.bytes_s:.3f}", f"{self.ratio:.2f}")


def row(operator: str, shape: str, launch: Launch, machine: Machine) -> Row:
    code, loops = launch.code, launch.code.loops
    inner = code.inside(loops[-1] if loops else None)
    return Row(
        operator,
        launch.name.strip("_"),
        shape,
        launch.registers,
        launch.stack,
        launch.resident(machine),
        dict(code.loads()),
        len(inner),
        sum(i.name.startswith("FFMA") for i in inner),
        launch.issue_seconds(trips(launch), machine),
        launch.memory_seconds(machine),
    )


def rows(
    operators: Sequence[str], shapes: Sequence[tuple[int, int]], batch: int, dtype: torch.dtype, machine: Machine
) -> Iterator[Row]:
    """Compile each operator whose name begins with one of ``operators`` at each shape (channels, side)."""
    for channels, side in shapes:
        for name, call in calls(channels, side, batch, dtype).items():
            if name.startswith(tuple(operators)):
                for launch in launches(call, machine.capability):
                    yield row(name, f"{channels}@{side}", launch, machine)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="the beginnings of operators' names")
    parser.add_argument("--gpu", choices=MACHINES, default="H200")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--batch", type=positive, default=256, help="images of a call (default: 256)")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    args = parser.parse_args(argv)
    console = Console()
    table = Table(*COLUMNS, title=f"{args.gpu}, {args.dtype}, batch {args.batch}: compiled and counted, not timed")
    found: list[Row] = []
    for shape in track(SHAPES, "compiling", console=Console(stderr=True)):
        found += rows(args.only, (shape,), args.batch, getattr(torch, args.dtype), MACHINES[args.gpu])
    for each in found:
        table.add_row(*each.cells())
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps([each._asdict() | {"ratio": each.ratio} for each in found], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
