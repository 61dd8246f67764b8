"""Sets how the process allocates memory."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_INT_MAX = 2**31 - 1


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for later allocations. For processes whose tensors are in host memory.

    By default glibc returns large blocks to the system. A training step, which allocates the same sizes again, then
    waits while the system fills every page with zeros. With a different C library this function does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _INT_MAX)
        mallopt(_M_MMAP_MAX, 0)
