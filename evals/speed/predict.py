"""Predicts a training step on GPUs from counted work: a row for each operator of a network, and the measured time.

Each call of an operator takes as long as its products at the rate of products, its bytes at the rate of the memory, or
the issue of its instructions, whichever is longest. Products and bytes are those of the traced network. The operators'
own kernels are compiled, and their instructions and bytes counted, by ``evals.gpu_code``. What lies between the calls
is not in the prediction: the launches, the host, and waiting inside kernels.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dico_t2i.models import NetworkConfig
from dico_t2i.ops import PRODUCTS, kernels
from dico_t2i.plan.cost import optimizer_traffic
from dico_t2i.plan.trace import Call, Pass
from evals import gpu_code
from evals.speed.machine_code import MACHINES, Launch, Machine, launches
from evals.speed.networks import Setting, TrainingStep, network_of, trace_step

UPDATE = "AdamW and the average"
SMALL = 1e-3  # of the time of a step: operators that take less are one line of a table
COLUMNS = ("operator", "calls", "TFLOP", "GB", "issue, ms")
_SIDE = 9  # of the kernels that the text makes
COMPILED = frozenset(
    f"dico_t2i::{name}"
    for name in (
        *("norm_modulate", "residual_norm_modulate", "norm_modulate_backward", "scale", "scale_backward"),
        *("gelu_backward", "linear_gelu", "gelu_linear_backward", "gate_linear", "gate_linear_backward"),
        *("depthwise", "depthwise_backward", "text_dwconv", "text_dwconv_backward"),
    )
)


_PRODUCTS = {operator._qualified_op_name for operator in PRODUCTS}


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
        of_products = 0.0 if call.operator in COMPILED - _PRODUCTS else flops / machine.products
        seconds, issue = _compiled(call, machine) if call.operator in COMPILED else (traffic / machine.bandwidth, 0.0)
        seconds = max(seconds, of_products)
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


def _kernels(call: Call) -> partial[object]:
    """The function that starts the kernels of a call, with tensors without data. The tensors that are there say which.

    A norm's backward is taken to write its output again, as all but the last one of a network do.
    """
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in call.shapes]
    images, vectors = ([tensor for tensor in tensors if tensor.ndim == ndim] for ndim in (4, 2))
    match call.operator.removeprefix("dico_t2i::"):
        case "norm_modulate" | "residual_norm_modulate":
            gate = vectors.pop() if len(vectors) % 2 else None
            branch = images[1] if len(images) > 1 else None
            return _later(kernels.norm_forward, images[0], branch, gate, *(vectors or (None, None)))
        case "norm_modulate_backward":
            source, *others, grad = images
            gate = vectors.pop() if len(vectors) % 2 else None
            branch = None if gate is None else others.pop()
            statistic = torch.empty(source.shape[:3], dtype=torch.float32, device="meta")
            modulation = vectors or (None, None)
            residual = others.pop() if others else None
            kept = (source, statistic, statistic, *modulation, branch, gate)
            return _later(kernels.norm_backward, *kept, residual, grad, True)
        case "scale":
            return _later(kernels.scale_forward, images[0], vectors[0], images[1] if len(images) > 1 else None)
        case "depthwise":
            return _later(kernels.depthwise_forward, *tensors[:3])
        case "text_dwconv":
            return _later(kernels.text_forward, *tensors[:2], _SIDE, *tensors[2:])
        case "text_dwconv_backward" if len(tensors) == 2:  # that of x, by the same kernel; the other one needs x
            return _later(kernels.text_forward, *reversed(tensors), _SIDE)
        case "text_dwconv_backward":
            return _later(kernels.text_backward, *tensors, _SIDE, (False, True))
        case "linear_gelu" | "gate_linear" as name:
            return _later(getattr(kernels, f"{name}_forward"), *tensors)
        case name:
            return _later(getattr(kernels, name), *tensors)


def _later(function: Callable[..., object], *arguments: object) -> partial[object]:
    return partial(function, *arguments)


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
