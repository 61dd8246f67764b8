"""Sets how the process allocates and keeps memory, and does in a fork what would leave much of it behind."""

import ctypes
import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

_FORK_PATIENCE_S = 600.0
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_INT_MAX = 2**31 - 1


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for later allocations. For processes whose tensors are in host memory.

    By default glibc returns large blocks to the system. A training step, which allocates the same sizes again, then
    waits while the system fills every page with zeros. What is free at the call is returned first: it was used to get
    ready. With a different C library this function does nothing.
    """
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is not None:
        libc.malloc_trim(0)
        mallopt(_M_TRIM_THRESHOLD, _INT_MAX)
        mallopt(_M_MMAP_MAX, 0)


def lock(array: np.ndarray) -> bool:
    """Keep the pages of an array in memory, where processes that map the same file share them.

    Returns False if the system refuses, as it does beyond the limit of ``ulimit -l``.
    """
    mlock = getattr(ctypes.CDLL(None), "mlock", None)
    return mlock is not None and mlock(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)) == 0


def in_fork(function: Callable[..., T], *arguments: Any) -> T:
    """Compute the result of a function in a fork of this process, so that the memory of what it imports does not stay.

    If the fork dies, is stuck on a lock that another thread held, or if the function raises, it is called here.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    fork = context.Process(target=_send, args=(sender, function, arguments), daemon=True)
    fork.start()
    sender.close()
    try:
        if receiver.poll(_FORK_PATIENCE_S):
            result: T = receiver.recv()
            return result
    except EOFError:
        pass
    finally:
        fork.kill()
        fork.join()
        receiver.close()
    return function(*arguments)


def _send(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with suppress(Exception):
        sender.send(function(*arguments))
