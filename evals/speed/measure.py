"""Times contenders against each other: interleaved rounds, a measured peak, memory, and the share of each operator."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dico_t2i.plan.trace import Pass

SHAPES = ((128, 32), (256, 16), (512, 8), (416, 32), (832, 16), (1664, 8))  # channels, side: of DiCo-S and DiCo-XL
_WARM_UPS = {"cuda": 3, "cpu": 1}  # to compile, to choose kernels, to create the optimizer's state
_SHORTEST_ROUND_S = 0.2  # on a GPU: short work is repeated, so that launches and clock rates average out


@dataclass
class Cost:
    """The cost of one run, counted and not measured."""

    flops: float  # useful ones: two for each multiply-accumulate of products and channel-by-channel convolutions
    traffic: float | None = None  # bytes read and written by the operations as they are called; None: not known


@dataclass
class Contender:
    """One way to do some work. run does it once; held: bytes of weights and optimizer state."""

    name: str
    run: Callable[[], Any]
    images: int
    held: float = 0.0
    cost: Cost | None = None


@dataclass
class Result:
    """The seconds of one run in each round, and other measurements of a contender."""

    name: str
    images: int
    seconds: list[float]
    peak_memory: float
    cost: Cost | None
    operators: list[tuple[str, float]] = field(default_factory=list)  # name, share of the time; the largest first

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def images_per_s(self) -> float:
        return self.images / self.median


def pass_cost(traced: Pass, backward: bool, more_traffic: float = 0.0) -> Cost:
    """The cost of a traced pass: forward alone, or with its backward and other traffic, such as the optimizer's."""
    part = slice(None) if backward else slice(traced.forward)
    flops = traced.products[part].sum() + traced.others[part].sum()
    return Cost(float(flops), float(traced.traffic[part].sum()) + more_traffic)


def compare(contenders: Sequence[Contender], rounds: int, device: torch.device, profiled: bool = True) -> list[Result]:
    """Run all in turn, round by round, after a warm-up, so that disturbances of the machine affect all of them."""
    results = []
    repeats = []
    for contender in contenders:
        for _ in range(_WARM_UPS[device.type]):
            once = _seconds(contender.run, 1, device)
        repeats.append(max(1, round(_SHORTEST_ROUND_S / once)) if device.type == "cuda" else 1)
        results.append(Result(contender.name, contender.images, [], 0.0, contender.cost))
    for _ in range(rounds):
        for contender, count, result in zip(contenders, repeats, results, strict=True):
            result.seconds.append(_seconds(contender.run, count, device))
    for contender, result in zip(contenders, results, strict=True):
        result.peak_memory = contender.held
        if profiled:
            result.operators, added = _profile(contender.run, device)
            result.peak_memory += added
    return results


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _seconds(run: Callable[[], Any], count: int, device: torch.device) -> float:
    """The seconds of one run, as the mean of ``count``; on a GPU by its own clock."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - started) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3 / count


def _profile(run: Callable[[], Any], device: torch.device) -> tuple[list[tuple[str, float]], float]:
    """The share of each operator in one run's time on the device, and the bytes that the run adds at its peak."""
    cuda = device.type == "cuda"
    if cuda:
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        added = torch.cuda.max_memory_allocated(device) - before
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, profile_memory=not cuda) as recorded:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    times = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in recorded.key_averages()
        if event.device_type == wanted
    }
    total = sum(times.values()) or 1
    shares = [(name, value / total) for name, value in sorted(times.items(), key=lambda item: -item[1])]
    return shares[:20], float(added) if cuda else _most_held(recorded)


def _most_held(recorded: profile) -> float:
    """The most bytes that tensors made in a profiled run on the CPU occupied at once."""
    held = most = 0
    events: Any = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return float(most)
