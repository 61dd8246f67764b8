"""Measures the collectives of training between ranks, and how well the plan's model of them fits.

    torchrun --nproc-per-node 8 evals/collectives.py                  # one node: link_gb_s and latency_us
    srun --nodes 16 --ntasks-per-node 8 python evals/collectives.py   # many nodes: network_gb_s, as in a job script

An all-reduce, a gather and a scatter of tensors of several sizes take turns, in several rounds; the shortest of each is
taken. In the plan a collective takes a delay, and its bytes divided by a rate (docs/scale.md). Both are fitted to every
other size, and the rest is predicted. Use the results as keys of ``cluster.hardware``.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dico_t2i.command import positive, run, script_parser
from dico_t2i.config import ClusterConfig
from dico_t2i.files import write_atomically
from dico_t2i.plan.topology import Group, Kind
from dico_t2i.training.ranks.distributed import World, join_world, leave_world

KINDS: tuple[Kind, ...] = ("all_reduce", "all_gather", "reduce_scatter")


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--megabytes", type=float, default=128.0, help="the largest tensor (default: 128)")
    parser.add_argument("--sizes", type=positive, default=9, help="how many sizes, each half of the last (default: 9)")
    parser.add_argument("--rounds", type=positive, default=15, help="how often each is measured (default: 15)")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file, too")
    options = parser.parse_args(argv)
    world = join_world()
    elements = [
        int(options.megabytes * 2**20 / 4 / 2**half) // world.size * world.size for half in range(options.sizes)
    ]
    measured = _measure(world, elements, options.rounds)
    if world.is_main:
        group = Group(ClusterConfig(gpus_per_node=0, tasks_per_node=world.size), world.size)
        results = {kind: fitted(group, kind, measured[kind]) for kind in KINDS}
        print(json.dumps(results, indent=1))
        if options.out:
            write_atomically(options.out, json.dumps(results, indent=1).encode())
    leave_world()
    return 0


def _measure(world: World, elements: Sequence[int], rounds: int) -> dict[Kind, dict[int, float]]:
    """The shortest seconds of each kind, by the bytes of the tensor; one more round at the start does not count."""
    taken: dict[tuple[Kind, int], list[float]] = {(kind, count): [] for kind in KINDS for count in elements}
    whole = torch.zeros(max(elements), device=world.device)
    part = torch.zeros(max(elements) // world.size, device=world.device)
    for _ in range(rounds + 1):
        for (kind, count), seconds in taken.items():
            seconds.append(_time(world, kind, whole[:count], part[: count // world.size]))
    return {kind: {4 * count: min(taken[kind, count][1:]) for count in elements} for kind in KINDS}


def _time(world: World, kind: Kind, whole: torch.Tensor, part: torch.Tensor) -> float:
    dist.barrier()
    started = time.perf_counter()
    if kind == "all_reduce":
        dist.all_reduce(whole)
    elif kind == "all_gather":
        dist.all_gather_into_tensor(whole, part)
    else:
        dist.reduce_scatter_tensor(part, whole)
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter() - started


def fitted(group: Group, kind: Kind, seconds: dict[int, float]) -> dict[str, object]:
    """The delay and the rate of a kind, fitted to every other size, and the errors of predictions of the rest.

    The fit has the least squared relative errors.
    """
    sent = np.array([group.sent(kind, size) for size in seconds])
    times = np.array(list(seconds.values()))
    known = np.arange(len(sent)) % 2 == 0
    columns = np.stack([np.ones(len(sent)), sent], axis=1) / times[:, None]
    (delay, per_byte), *_ = np.linalg.lstsq(columns[known], np.ones(known.sum()), rcond=None)
    errors = (delay + per_byte * sent) / times - 1
    return {
        "latency_us": round(1e6 * float(delay), 1),
        "gb_s": round(1e-9 / float(per_byte), 3),
        "milliseconds": {f"{size / 2**20:.2f} MB": round(1e3 * each, 3) for size, each in seconds.items()},
        "errors of the rest, %": [round(100 * float(error), 1) for error in errors[~known]],
    }


if __name__ == "__main__":
    sys.exit(run(main))
