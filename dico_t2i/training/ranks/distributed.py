"""Joins the ranks of a run, as described by torchrun's or SLURM's environment, or as a single process."""

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dico_t2i.training.ranks.node import compile_in_turn, follow_nccl, keep_kernels_here

T = TypeVar("T")

PATIENCE = timedelta(hours=12)  # for rank 0's work in ``main_first``

_RESOLVE_S = 5.0
_numbers = count()  # of the calls of ``main_first``, the same on all ranks
_flags_group: dist.ProcessGroup | None = None  # uses host memory, so that agreeing does not wait for a GPU


class MeetingError(OSError):
    """The ranks cannot meet at the given address and port; another start, on another port, may."""


@dataclass(frozen=True)
class World:
    """The place of this process: global rank, number of ranks, rank on this node, device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_world(timeout: timedelta = timedelta(minutes=10)) -> World:
    """Join the process group that the environment describes; a single process forms its own group.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT (torchrun), else SLURM_PROCID, SLURM_NTASKS,
    SLURM_LOCALID with MASTER_ADDR and MASTER_PORT set by the job. Raises ValueError if some of them are missing, and
    MeetingError when the ranks cannot meet there.
    """
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    if "RANK" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    missing = [key for key in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if key not in env]
    if missing:
        raise ValueError(
            f"RANK is set, but {', '.join(missing)} is not; start with torchrun, or set all of them in the job script"
        )
    local_rank = int(env["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU: {socket.gethostname()} shows {torch.cuda.device_count()};"
                " start one process for each GPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _check_address(env["MASTER_ADDR"], env["MASTER_PORT"])
        follow_nccl()
        try:
            _init_group(device, timeout)
        except dist.DistError as error:
            raise MeetingError(_refusal(error)) from None
    if device.type == "cuda":
        global _flags_group
        _flags_group = _flags_group or cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
    world = World(int(env["RANK"]), int(env["WORLD_SIZE"]), local_rank, device)
    if world.size > 1:
        keep_kernels_here()
        if device.type == "cuda":
            compile_in_turn()
    return world


def _init_group(device: torch.device, timeout: timedelta) -> None:
    """Create the process group: NCCL's on GPUs, bound to this rank's GPU, else gloo's."""
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)


def main_first(work: Callable[[], T], world: World) -> T:
    """The result of some work that rank 0 does before all others, such as building what they then read; collective.

    The others wait in the rendezvous' store, where no time-out of collectives applies, for up to ``PATIENCE``. They end
    with an error if rank 0 ends without having done the work.
    """
    key = f"dico_t2i/main_first/{next(_numbers)}"
    store = dist.distributed_c10d._get_default_store()
    if not world.is_main:
        store.wait([key], PATIENCE)
        return work()
    result = work()
    store.set(key, "")
    return result


def _check_address(host: str, port: str) -> None:
    """Raise ValueError for a port that is none, MeetingError for a host of which no address is found in time.

    A name may be unknown for a moment while a job starts, and a name server that is away can take minutes to say so.
    """
    if not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ValueError(f"MASTER_PORT={port}: not a port, 1 to 65535")
    found: list[object] = []
    why = [f"no answer in {_RESOLVE_S:g} s"]

    def resolve() -> None:
        while not found:
            try:
                found.append(socket.getaddrinfo(host, int(port)))
            except OSError as error:
                why[0] = str(error.strerror)
                time.sleep(1)

    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(_RESOLVE_S)
    if not found:
        found.append(None)  # ends the thread
        raise MeetingError(
            f"MASTER_ADDR={host}: cannot be resolved ({why[0]}); give the name or address of rank 0's node"
        )


def _refusal(error: Exception) -> str:
    """What torch says of a rendezvous that failed, in one line."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "EADDRINUSE" in str(error):
        return f"MASTER_PORT={port}: in use on {socket.gethostname()}; another job listens there, set a free one"
    said = str(error).splitlines()[0]
    return f"the ranks did not meet at MASTER_ADDR={address}, MASTER_PORT={port}: {said}"


def leave_world() -> None:
    """Wait for the other ranks and leave the process group; collective. A process calls this last.

    A rank that exits without it closes connections that others still use, which then abort although their work is done.
    """
    dist.barrier()
    dist.destroy_process_group()


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over the ranks; collective."""
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """For each flag, whether it is set on any rank; collective."""
    values = torch.tensor(flags, dtype=torch.int32, device="cpu" if _flags_group else device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=_flags_group)
    return [bool(value) for value in values.tolist()]


def from_main(text: str, device: torch.device) -> str:
    """Rank 0's text, on all ranks; collective."""
    content = bytearray(text.encode())
    length = torch.tensor([len(content)], device=device)
    dist.broadcast(length, 0)
    shared = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if dist.get_rank() == 0 and content:
        shared.copy_(torch.frombuffer(content, dtype=torch.uint8))
    dist.broadcast(shared, 0)
    return bytes(shared.cpu().numpy()).decode()


def first_message(text: str, device: torch.device) -> str:
    """The text of the first rank whose text is not empty, cut to 1,000 bytes; collective."""
    length = 1000
    mine = torch.zeros(length, dtype=torch.uint8, device=device)
    content = text.encode()[:length]
    mine[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
    texts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(texts, mine)
    decoded = (bytes(t.tolist()).rstrip(b"\0").decode(errors="replace") for t in texts)
    return next((message for message in decoded if message), "")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
