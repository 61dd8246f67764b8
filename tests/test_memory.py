import ctypes
import importlib
import os
import signal
import subprocess
import sys

import pytest

from dico_t2i.memory import in_fork

PARENT = os.getpid()
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


def _imports_in_a_fork(name):
    importlib.import_module(name)
    return os.getpid(), name in sys.modules


def _dies():
    if os.getpid() != PARENT:
        os.kill(os.getpid(), signal.SIGKILL)
    return "here"


def test_what_a_fork_imports_does_not_stay():
    sys.modules.pop("this", None)
    fork, imported = in_fork(_imports_in_a_fork, "this")
    assert imported
    assert fork != os.getpid()
    assert "this" not in sys.modules


def test_a_fork_that_raises_or_dies_is_replaced_by_a_call():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        in_fork(_imports_in_a_fork, "no_such_module")
    assert in_fork(_dies) == "here"
