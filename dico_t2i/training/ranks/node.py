"""What the ranks of a node settle with each other and with their node: network interface, and cache of GPU kernels."""

import fcntl
import os
import socket
import struct
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

KERNELS = "TRITON_CACHE_DIR"
INTERFACE = "GLOO_SOCKET_IFNAME"

_NCCL_INTERFACE = "NCCL_SOCKET_IFNAME"
_ADDRESS_OF = 0x8915  # the ioctl SIOCGIFADDR
_POLL_S = 0.05


def follow_nccl() -> None:
    """Let gloo use the network interface that NCCL was told to use, unless it was told itself."""
    choice = os.environ.get(_NCCL_INTERFACE, "")
    if choice and INTERFACE not in os.environ:
        found = chosen_interface(choice, [name for _, name in socket.if_nameindex() if _has_address(name)])
        if found:
            os.environ[INTERFACE] = found


def chosen_interface(choice: str, names: Sequence[str]) -> str | None:
    """The first of the names that NCCL_SOCKET_IFNAME allows: prefixes; after ^ those to avoid; after = whole names."""
    avoided = choice.startswith("^")
    wanted = choice.removeprefix("^")
    whole = wanted.startswith("=")
    words = [word for word in wanted.removeprefix("=").split(",") if word]

    def named(name: str) -> bool:
        return any(name == word if whole else name.startswith(word) for word in words)

    return next((name for name in names if named(name) != avoided), None)


def _has_address(name: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            fcntl.ioctl(probe, _ADDRESS_OF, struct.pack("256s", name.encode()))
        except OSError:
            return False
    return True


def keep_kernels_here() -> None:
    """Keep compiled kernels on the node's own disk, unless TRITON_CACHE_DIR is set: many ranks would crowd the home.

    The folder belongs to this user alone, since its files are executed. If someone else has taken its name, the kernels
    stay in the home folder.
    """
    if KERNELS in os.environ:
        return
    folder = Path(tempfile.gettempdir()) / f"dico_t2i-kernels-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        held = folder.lstat()
    except OSError:
        return
    if held.st_uid == os.getuid() and not held.st_mode & 0o077 and folder.is_dir() and not folder.is_symlink():
        os.environ[KERNELS] = str(folder)


class OneCompiler:
    """Lets one rank of a node compile at a time; the others then find the kernel in the cache.

    Triton writes its cache atomically, but all ranks that miss a kernel compile it. It calls ``begin`` before it looks
    for a kernel on disk, and ``end`` when it has it.
    """

    def __init__(self, folder: Path, patience_s: float = 300.0) -> None:
        self.folder, self.patience_s = folder, patience_s
        self._lock: int | None = None

    def begin(self, **_: Any) -> bool:
        """Wait until no other rank compiles, at most for ``patience_s``. Returns False, so that Triton goes on."""
        if self._lock is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "compiling.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        until = time.monotonic() + self.patience_s
        while time.monotonic() < until:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it if the process dies
                break
            except BlockingIOError:
                time.sleep(_POLL_S)
        return False

    def end(self, **_: Any) -> None:
        """Let the next rank compile."""
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)


def compile_in_turn() -> None:
    """Install ``OneCompiler`` in Triton, if it is there and nothing else uses its hooks."""
    if find_spec("triton") is None:
        return
    from triton import knobs

    if knobs.runtime.jit_cache_hook is None and knobs.runtime.jit_post_compile_hook is None:
        compiler = OneCompiler(Path(knobs.cache.dir))
        knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook = compiler.begin, compiler.end
