"""Prints how the speed of a config grows with the number of nodes, and draws it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from dico_t2i.config import Config
from dico_t2i.plan.scaling import Scale


def render_sweep(config: Config, growing: Sequence[Scale], fixed: Sequence[Scale]) -> Group:
    """Both sweeps for rich's console: with a batch that grows with the nodes, and with the config's own."""
    per_rank = growing[0].batch // growing[0].ranks
    stage = f"ZeRO-{config.train.zero_stage}"
    group = f" in groups of {config.train.zero_group}" if config.train.zero_group else ""
    return Group(
        f"{config.name} on {config.cluster.hardware.name}, {stage}{group}",
        f"the batch grows with the nodes: {per_rank} samples of each device and step",
        _table(growing, enough=True),
        f"the batch is always {config.train.global_batch}; numbers of devices that do not divide it are left out",
        _table(fixed),
    )


def _table(scales: Sequence[Scale], enough: bool = False) -> Table:
    names = ("nodes", "devices", "batch", "step, ms", "not hidden", "images/s", "efficiency", "bottleneck, ms")
    table = Table(*names, *(["batch for 0.90"] if enough else []))
    for scale in scales:
        fits = "" if scale.estimate.fits else " (memory does not suffice)"
        cost = scale.costs.get(scale.bottleneck)
        table.add_row(
            str(scale.nodes),
            str(scale.ranks),
            f"{scale.batch:,}",
            f"{1e3 * scale.estimate.step_s:.1f}",
            f"{1e3 * scale.estimate.communication_s:.1f}",
            f"{scale.estimate.images_per_s:,.0f}",
            f"{scale.efficiency:.3f}",
            scale.bottleneck + (f", {1e3 * cost:.1f}" if cost else "") + fits,
            *([f"{scale.enough:,}" if scale.enough else "none"] if enough else []),
        )
    return table


def sweep_summary(scales: Sequence[Scale]) -> list[dict[str, Any]]:
    """The numbers for a file."""
    return [
        {
            "nodes": scale.nodes,
            "ranks": scale.ranks,
            "batch": scale.batch,
            "step_s": scale.estimate.step_s,
            "communication_s": scale.estimate.communication_s,
            "images_per_s": scale.estimate.images_per_s,
            "efficiency": scale.efficiency,
            "bottleneck": scale.bottleneck,
            "costs_s": dict(scale.costs),
            "batch_for_0.9": scale.enough,
            "fits": scale.estimate.fits,
        }
        for scale in scales
    ]


def draw_sweep(config: Config, growing: Sequence[Scale], fixed: Sequence[Scale], path: Path) -> None:
    """Draw images per second and the efficiency by the number of devices, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    per_rank = growing[0].batch // growing[0].ranks
    for scales, label, style in (
        (growing, f"{per_rank} samples of each device", "o-"),
        (fixed, f"batch {config.train.global_batch}", "s--"),
    ):
        ranks = [scale.ranks for scale in scales]
        left.loglog(ranks, [scale.estimate.images_per_s for scale in scales], style, label=label)
        right.semilogx(ranks, [scale.efficiency for scale in scales], style, label=label)
    first = growing[0]
    ideal = [first.estimate.images_per_s * scale.ranks / first.ranks for scale in growing]
    left.loglog([scale.ranks for scale in growing], ideal, ":", color="black", label="proportional")
    left.set(xlabel="devices", ylabel="images/s, predicted", title=config.name)
    right.set(xlabel="devices", ylabel=f"efficiency, relative to {first.ranks} devices", ylim=(0, 1.05))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
