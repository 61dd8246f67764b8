"""Sets how the process allocates and keeps memory."""

import ctypes

import numpy as np

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
