import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of 4 KB alone, whatever else the machine does
if sys.argv[1] == "keep":
    from dico_t2i.memory import keep_freed_memory
    keep_freed_memory()

def allocate():
    a, b = torch.ones(1 << 22), torch.ones(1 << 24)

for _ in range(20):
    allocate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    allocate()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_freed_memory_is_used_again():
    """Of 16 and 64 MB, five times over: without, a page each 4 KB."""
    usual, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("usual", "keep")
    )
    assert kept < usual / 4
