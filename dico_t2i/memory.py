"""How the process gets its memory."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_INT_MAX = 2**31 - 1


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what comes next. For processes whose tensors are in host memory.

    By default it gives large pieces back to the system, and a training step, which allocates the same again, waits
    while every page is filled with zeros. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _INT_MAX)
        mallopt(_M_MMAP_MAX, 0)
