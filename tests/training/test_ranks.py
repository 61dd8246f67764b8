"""How ranks begin: who works first, who compiles, and over which interface they speak."""

import inspect
import os
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dico_t2i.training.ranks import distributed
from dico_t2i.training.ranks.distributed import World, main_first
from dico_t2i.training.ranks.node import (
    INTERFACE,
    KERNELS,
    OneCompiler,
    chosen_interface,
    compile_in_turn,
    follow_nccl,
    keep_kernels_here,
)

NAMES = ["lo", "eth0", "ib0", "ib1"]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("ib", "ib0"),
        ("ib1", "ib1"),
        ("=ib", None),
        ("=ib1,eth0", "eth0"),
        ("^lo,eth", "ib0"),
        ("^=lo,ib0,ib1", "eth0"),
        ("wlan", None),
    ],
)
def test_gloo_takes_an_interface_that_nccl_may_use(choice, expected):
    assert chosen_interface(choice, NAMES) == expected


def test_gloos_interface_is_set_unless_it_was(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    monkeypatch.setenv(INTERFACE, "ib7")
    follow_nccl()
    assert os.environ[INTERFACE] == "ib7"
    monkeypatch.delenv(INTERFACE)
    follow_nccl()
    assert os.environ[INTERFACE] == "lo"


def test_kernels_are_kept_on_the_node_in_a_folder_of_ones_own(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv(KERNELS, "mine")
    keep_kernels_here()
    assert os.environ[KERNELS] == "mine"
    monkeypatch.delenv(KERNELS)
    keep_kernels_here()
    folder = tmp_path / f"dico_t2i-kernels-{os.getuid()}"
    assert os.environ[KERNELS] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv(KERNELS)
    folder.chmod(0o777)  # others could put files there, which would be executed
    keep_kernels_here()
    assert KERNELS not in os.environ
    folder.rmdir()
    folder.symlink_to(tmp_path)
    keep_kernels_here()
    assert KERNELS not in os.environ


def test_one_rank_of_a_node_compiles_at_a_time(tmp_path):
    first, second = OneCompiler(tmp_path), OneCompiler(tmp_path)
    assert first.begin(key="kernel") is False
    other = threading.Thread(target=second.begin)
    other.start()
    other.join(0.3)
    assert other.is_alive()
    first.end(key="kernel")
    other.join(5)
    assert not other.is_alive()
    started = time.monotonic()
    impatient = OneCompiler(tmp_path, patience_s=0.1)  # a rank whose compiler failed does not hold up the others
    assert impatient.begin() is False
    assert time.monotonic() - started < 5


def test_triton_has_the_hooks_that_bring_this_about(monkeypatch, tmp_path):
    """Triton calls one before it looks for a kernel on disk, and the other when it has the kernel."""
    triton = pytest.importorskip("triton")
    monkeypatch.setenv(KERNELS, str(tmp_path))
    with triton.knobs.runtime.scope():
        compile_in_turn()
        before, after = triton.knobs.runtime.jit_cache_hook, triton.knobs.runtime.jit_post_compile_hook
    assert before.__self__ is after.__self__
    assert before.__self__.folder == tmp_path
    source = inspect.getsource(triton.runtime.jit.JITFunction._do_compile)
    assert source.index("jit_cache_hook") < source.index("self.compile(") < source.rindex("jit_post_compile_hook")


def test_the_others_wait_for_rank_0_longer_than_for_a_collective(monkeypatch):
    """On two threads that share a store: a collective would give up after a second."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(distributed, "_numbers", iter([0, 0]))
    order = []

    def begin(rank: int) -> threading.Thread:
        world = World(rank, 2, rank, torch.device("cpu"))
        thread = threading.Thread(target=main_first, args=(lambda: order.append(rank), world))
        thread.start()
        return thread

    other = begin(1)
    other.join(1.5)
    assert other.is_alive()
    main = begin(0)
    main.join(10)
    other.join(10)
    assert order == [0, 1]
