"""Predicts a training step on GPUs from counted work: a row for each operator of a network, and the measured time.

Each call of an operator takes as long as its products at the rate of products, its bytes at the rate of the memory, or
the issue of its instructions, whichever is longest. Products and bytes are those of the traced network. The operators'
own kernels are compiled, and their instructions and bytes counted, by ``evals.gpu_code``. What lies between the calls
is not in the prediction: the launches, the host, and waiting inside kernels.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dico_t2i.models import NetworkConfig
from dico_t2i.ops import kernels
from dico_t2i.plan.cost import optimizer_traffic
from dico_t2i.plan.trace import Call, Pass
from evals import gpu_code
from evals.speed.machine_code import MACHINES, Launch, Machine, launches
from evals.speed.networks import Setting, TrainingStep, network_of, trace_step

UPDATE = "AdamW and the average"
SMALL = 1e-3  # of the time of a step: operators that take less are one line of a table
GELU = "dico_t2i::gelu_backward"
COLUMNS = ("operator", "calls", "TFLOP", "GB", "issue, ms")
# The operators whose kernels are compiled -> their names in gpu_code.calls. A norm or factor with less around it is
# counted as the one with all parts, which has more bytes: of a step of DiCo-XL 11 ms on an H200 are too much for this.
_COMPILED = {
    "dico_t2i::norm_modulate": "norm forward",
    "dico_t2i::residual_norm_modulate": "norm forward",
    "dico_t2i::norm_modulate_backward": "norm backward",
    "dico_t2i::scale": "factor forward",
    "dico_t2i::scale_backward": "factor backward",
    "dico_t2i::depthwise": "depthwise forward",
    "dico_t2i::depthwise_backward": "depthwise backward",
    "dico_t2i::text_dwconv": "text forward",
    "dico_t2i::text_dwconv_backward": "text backward",
}


@dataclass
class Row:
    """An operator in a step: calls, operations, bytes, seconds of issue on an H200, and predicted seconds by GPU."""

    operator: str
    calls: int = 0
    flops: float = 0.0
    traffic: float = 0.0
    issue_s: float = 0.0
    predicted_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    measured_s: float | None = None


class Step(NamedTuple):
    """The rows of a training step, the longest first, and the bytes an image that it keeps for the backward pass."""

    rows: list[Row]
    kept: float


def predict(config: NetworkConfig, batch: int, size: int, gpus: Sequence[str] = tuple(MACHINES)) -> Step:
    """Our network's training step in bf16."""
    setting = Setting(config, batch, size, torch.device("meta"))
    traced, parameters = trace_step("ours", setting)
    rows: dict[str, Row] = {}
    calls = track(_distinct(traced).items(), "compiling", console=Console(stderr=True), transient=True)
    for (call, flops, traffic), count in calls:
        if flops or traffic:
            row = rows.setdefault(call.operator, Row(call.operator))
            _add(row, call, count, (flops, traffic), gpus)
    bytes_moved = float(optimizer_traffic(parameters, 1))
    update = Row(UPDATE, 1, 0.0, bytes_moved)
    update.predicted_s.update({gpu: bytes_moved / MACHINES[gpu].bandwidth for gpu in gpus})
    longest_first = sorted([*rows.values(), update], key=lambda row: -row.predicted_s[gpus[-1]])
    return Step(longest_first, sum(traced.kept.values()) / batch)


def _distinct(traced: Pass) -> Counter[tuple[Call, float, float]]:
    work = traced.products + traced.others
    return Counter(zip(traced.calls, work.tolist(), traced.traffic.tolist(), strict=True))


def _add(row: Row, call: Call, count: int, work: tuple[float, float], gpus: Sequence[str]) -> None:
    flops, traffic = work
    row.calls += count
    row.flops += count * flops
    row.traffic += count * traffic
    for gpu in gpus:
        machine = MACHINES[gpu]
        if call.operator in (*_COMPILED, GELU):
            seconds, issue = _compiled(call, machine)
        else:
            seconds, issue = max(flops / machine.products, traffic / machine.bandwidth), 0.0
        row.predicted_s[gpu] += count * seconds
        if gpu == gpus[-1]:
            row.issue_s += count * issue


def _compiled(call: Call, machine: Machine) -> tuple[float, float]:
    """Seconds of a call, and those of its issue: the sums over its kernels."""
    found = _launches(call, machine.capability)
    issues = [launch.issue_seconds(gpu_code.trips(launch), machine) for launch in found]
    return sum(max(i, launch.memory_seconds(machine)) for i, launch in zip(issues, found, strict=True)), sum(issues)


@cache
def _launches(call: Call, capability: int) -> tuple[Launch, ...]:
    """The same for all GPUs of a compute capability."""
    return tuple(launches(_kernels(call), capability))


def _kernels(call: Call) -> Callable[[], object]:
    """A function that starts the kernels of a call, of tensors without data."""
    if call.operator == GELU:  # of images, and of tokens
        x = torch.empty(call.shapes[0], dtype=torch.bfloat16, device="meta")
        return lambda: kernels.gelu_backward(x, x)
    images = [shape for shape in call.shapes if len(shape) == 4]
    N, side, _, C = max(images, key=lambda shape: shape[1])  # a convolution's weight has 1 there
    name = _COMPILED[call.operator]
    if name == "text backward" and len(images) == 1:
        name = "text forward"  # the gradient of x is one; that of the tokens needs x as well
    return gpu_code.calls(C, side, N, torch.bfloat16)[name]


def measure_step(config: NetworkConfig, batch: int, size: int, device: torch.device, rows: Sequence[Row]) -> float:
    """Run the step, fill in each row's time on the device, and return the seconds of all operators together."""
    setting = Setting(config, batch, size, device)
    with device:
        step = TrainingStep(network_of("ours", setting).to(device), setting, ours=True, lower=False)
    for _ in range(3):
        step()
    times = operator_seconds(step, device)
    for row in rows:
        row.measured_s = times.get(row.operator)
    known = {row.operator for row in rows}
    for row in rows:
        if row.operator == UPDATE:
            row.measured_s = sum(seconds for name, seconds in times.items() if name not in known)
    return sum(times.values())


def operator_seconds(step: TrainingStep, device: torch.device) -> Mapping[str, float]:
    """Seconds of one step by operator; those inside one of ours belong to it."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as recorded:
        step()
        if cuda:
            torch.cuda.synchronize(device)
    times: Counter[str] = Counter()
    for event in recorded.events() or ():
        if event.device_type != DeviceType.CPU or _inside_ours(event):
            continue
        ours = event.name.startswith("dico_t2i::")
        if cuda:
            spent = event.device_time_total if ours else event.self_device_time_total
        else:
            spent = event.cpu_time_total if ours else event.self_cpu_time_total
        times[event.name] += spent / 1e6
    return times


def _inside_ours(event: object) -> bool:
    parent = event.cpu_parent  # type: ignore[attr-defined]
    while parent is not None:
        if parent.name.startswith("dico_t2i::"):
            return True
        parent = parent.cpu_parent
    return False


def cells(rows: Sequence[Row], gpus: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The cells of the table: COLUMNS, predicted ms by GPU, measured ms, predicted over measured of the last GPU."""
    least = SMALL * total(rows).predicted_s[gpus[-1]]
    small = [row for row in rows if row.predicted_s[gpus[-1]] < least]
    large = [row for row in rows if row not in small]
    for row in [*large, total(small, f"{len(small)} other operators"), total(rows)]:
        measured = row.measured_s
        yield (
            row.operator,
            f"{row.calls:,}",
            f"{row.flops / 1e12:.2f}" if row.flops else "",
            f"{row.traffic / 1e9:.1f}",
            f"{1e3 * row.issue_s:.1f}" if row.issue_s else "",
            *(f"{1e3 * row.predicted_s[gpu]:.1f}" for gpu in gpus),
            f"{1e3 * measured:.1f}" if measured else "",
            f"{row.predicted_s[gpus[-1]] / measured:.2f}" if measured else "",
        )


def total(rows: Sequence[Row], name: str = "all") -> Row:
    """The sums of the rows."""
    sums = Row(name)
    for row in rows:
        sums.calls += row.calls
        sums.flops += row.flops
        sums.traffic += row.traffic
        sums.issue_s += row.issue_s
        for gpu, seconds in row.predicted_s.items():
            sums.predicted_s[gpu] += seconds
    known = [row.measured_s for row in rows if row.measured_s is not None]
    sums.measured_s = sum(known) if known else None
    return sums


def heads(gpus: Sequence[str]) -> tuple[str, ...]:
    """The titles of the columns."""
    return (*COLUMNS, *(f"{gpu}, ms" for gpu in gpus), "measured, ms", "predicted / measured")


def table(title: str, rows: Sequence[Row], gpus: Sequence[str]) -> Table:
    made = Table(*heads(gpus), title=title)
    for line in cells(rows, gpus):
        made.add_row(*line)
    return made


def markdown(title: str, rows: Sequence[Row], gpus: Sequence[str]) -> str:
    return f"**{title}**\n\n" + as_markdown([heads(gpus), *cells(rows, gpus)])


def as_markdown(lines: Sequence[tuple[str, ...]]) -> str:
    """A table, its head first."""
    head, *rest = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ("---",) * len(head), *rest))
