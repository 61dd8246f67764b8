"""Prints a plan as text and tables for the terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.table import Table

from dico_t2i.plan.plan import USABLE, Plan


def render(plans: Sequence[Plan]) -> RenderableType:
    """The plan of each stage, and a table of all stages if there are several, for rich's console."""
    parts: list[RenderableType] = []
    for plan in plans:
        parts += [*_head(plan), _memory(plan), _time(plan), _communication(plan), *_rest(plan)]
    return Group(*parts, *([_stages(plans)] if len(plans) > 1 else []))


def refusals(plans: Sequence[Plan]) -> str:
    """The message for the stages that do not fit, with settings that would; empty if all fit."""
    return "\n".join(refusal(plan) for plan in plans if not plan.estimate.fits)


def _stages(plans: Sequence[Plan]) -> Table:
    """A row for each stage, and their sum."""
    table = Table("stage", "steps", "batch", "GB of a GPU", "images/s", "days", "GPU-hours")
    for plan in plans:
        batch = plan.ranks * plan.micro_batch * plan.accumulation
        table.add_row(
            plan.name.rpartition(", stage ")[2],
            f"{plan.steps:,}" if plan.steps else "?",
            str(batch),
            f"{plan.estimate.memory.total / 1e9:.2f}",
            f"{plan.estimate.images_per_s:,.0f}",
            _amount(plan.days),
            _amount(plan.gpu_hours),
        )
    days, hours, steps = ([getattr(plan, key) for plan in plans] for key in ("days", "gpu_hours", "steps"))
    table.add_row(
        "all",
        f"{sum(steps):,}" if all(steps) else "?",
        "",
        f"{max(plan.estimate.memory.total for plan in plans) / 1e9:.2f}",
        "",
        _amount(sum(days) if all(days) else None),
        _amount(sum(hours) if all(hours) else None),
        style="bold",
    )
    return table


def _amount(value: float | None) -> str:
    return "?" if value is None else f"{value:,.1f}"


def refusal(plan: Plan) -> str:
    """The message for a run that does not fit, with settings that would."""
    need, have = plan.estimate.memory.total, USABLE * 1e9 * plan.hardware.memory_gb
    lines = [f"{plan.name} needs {_gb(need)} on each {plan.hardware.name}, but {_gb(have)} can be used. What fits:"]
    for change, estimate in plan.remedies.items():
        lines.append(f"  {change}: {_gb(estimate.memory.total)}, {estimate.images_per_s:,.0f} images/s")
    if not plan.remedies:
        lines.append("  no micro-batch, recomputation or ZeRO stage fits; use more or larger GPUs")
    return "\n".join(lines)


def _head(plan: Plan) -> Iterator[str]:
    scan = f", {plan.scan_macs_per_image / 1e9:,.1f} of them in scans" if plan.scan_macs_per_image else ""
    macs = f"{plan.macs_per_image / 1e9:,.1f} GMACs per image{scan}"
    yield f"{plan.name}: {plan.parameters / 1e6:,.1f}M parameters, {macs}"
    batch = plan.ranks * plan.micro_batch * plan.accumulation
    passes = "pass" if plan.accumulation == 1 else "passes"
    yield (
        f"{plan.nodes} nodes, {plan.ranks} x {plan.hardware.name}: batch {batch} = {plan.ranks} ranks x"
        f" {plan.micro_batch} x {plan.accumulation} {passes}, ZeRO-{plan.zero_stage}"
    )


def _memory(plan: Plan) -> Table:
    table = Table("memory of a GPU", "GB", title=None)
    for part, size in asdict(plan.estimate.memory).items():
        table.add_row(part.replace("_", " "), f"{size / 1e9:.2f}" if size >= 1e7 or not size else f"{size / 1e9:.1g}")
    table.add_row(f"all (of {plan.hardware.memory_gb:g})", f"{plan.estimate.memory.total / 1e9:.2f}", style="bold")
    for stages, estimate in plan.recomputing.items():
        table.add_row(f"all, recomputing {stages}", f"{estimate.memory.total / 1e9:.2f}")
    return table


def _time(plan: Plan) -> Table:
    estimate = plan.estimate
    table = Table("time of a step, lower bound", "ms")
    for name in ("network_s", "text_encoder_s", "optimizer_s"):
        table.add_row(name.removesuffix("_s").replace("_", " "), f"{1e3 * getattr(estimate, name):.1f}")
    table.add_row("communication, not hidden", f"{1e3 * estimate.communication_s:.1f}")
    table.add_row("all", f"{1e3 * estimate.step_s:.1f}", style="bold")
    for stages, other in plan.recomputing.items():
        table.add_row(f"all, recomputing {stages}", f"{1e3 * other.step_s:.1f}")
    return table


def _communication(plan: Plan) -> Table:
    where = "between nodes" if plan.nodes > 1 else "in the node"
    table = Table("ZeRO stage", "each GPU sends, GB per step", f"{where}, ms", "hidden, ms", "not hidden, ms")
    for stage, part in plan.communication.items():
        style = "bold" if stage == plan.zero_stage else ""
        times = (f"{1e3 * time:.1f}" for time in (part.seconds, part.hidden, part.exposed))
        table.add_row(str(stage), f"{part.sent / 1e9:.2f}", *times, style=style)
    return table


def _rest(plan: Plan) -> Iterator[str]:
    estimate = plan.estimate
    rate = estimate.images_per_s
    flops = f"{plan.flops_per_image / 1e9:,.0f} GFLOP per image"
    yield f"{rate:,.0f} images/s at most, {rate / plan.ranks:,.0f} per GPU; {flops}"
    if plan.sample_bytes:
        a_node = rate / plan.nodes
        yield f"data: {a_node:,.0f} samples/s and {a_node * plan.sample_bytes / 1e6:,.1f} MB/s for each node"
    disk = f"{plan.checkpoint_s:.1f} s at {plan.hardware.disk_gb_s:g} GB/s per node"
    yield f"checkpoint: {_gb(plan.checkpoint_bytes)}, written in {disk}"
    if plan.days and plan.steps:
        yield f"{plan.steps:,} steps: {plan.days:,.1f} days, {plan.gpu_hours:,.0f} GPU-hours at least"
    yield from (f"note: {note}" for note in plan.notes)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
