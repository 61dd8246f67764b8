"""Runs the operators in C on CPU tensors; the C code is compiled once for each machine.

The library is in the user's cache, under a hash of everything it depends on. It is linked to the OpenMP library that
torch has loaded and so uses torch's threads. ``library`` is None without a compiler, or with DICO_NO_COMPILER=1.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dico_t2i.ops import plain

SOURCES = [Path(__file__).with_name(name) for name in ("operators.c", "scans.c")]
HEADER = Path(__file__).with_name("lanes.h")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
NORM_EPS = 1e-6
TEXT_KERNELS = (3, 5, 7, 9, 11)  # the sizes that operators.c implements

logger = logging.getLogger(__name__)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled operators, or None with one warning in the log if they cannot be compiled."""
    if os.environ.get("DICO_NO_COMPILER") == "1":
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        logger.warning("No C compiler (cc): the operators run through torch, which is slower, above all with text.")
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip()
        folder = HEADER.parent
        logger.warning("%s could not be compiled: the operators run through torch, which is slower. %s", folder, reason)
        return None


def _built(compiler: str) -> Path:
    """The path of the library, which is compiled first if necessary, by one process at a time."""
    runtime = _openmp()
    texts = [path.read_text() for path in (HEADER, *SOURCES)]
    key = hashlib.sha256(repr((texts, compiler, FLAGS, runtime, _cpu())).encode()).hexdigest()[:24]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dico_t2i" / "operators"
    path = folder / f"{key}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as made:
                _compile(compiler, runtime, Path(made))
                (Path(made) / "operators.so").replace(path)
    return path


def _compile(compiler: str, runtime: str | None, folder: Path) -> None:
    """Compile SOURCES to folder/operators.so."""
    made = {source: str(folder / f"{source.stem}.o") for source in SOURCES}
    commands = [[compiler, *FLAGS, "-c", str(source), "-o", target] for source, target in made.items()]
    openmp = [runtime] if runtime else ["-fopenmp"]
    commands.append([compiler, "-shared", *made.values(), *openmp, "-lm", "-o", str(folder / "operators.so")])
    for command in commands:
        subprocess.run(command, check=True, capture_output=True, text=True)


def _openmp() -> str | None:
    """The GNU OpenMP that torch has loaded. The threads of a second copy would compete with those of the first."""
    try:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    except OSError:
        return None
    return next((path for path in sorted(mapped) if Path(path).name.startswith("libgomp")), None)


def _cpu() -> str:
    """The processor's architecture and features, which -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(("flags", "model", "Feat"))}))


def call(name: str, *arguments: Tensor | float | ctypes.Array | None) -> None:
    """Call a function of the library on contiguous float32 tensors, with torch's number of threads."""
    loaded = library()
    assert loaded is not None
    if getattr(loaded, name)(*map(_argument, arguments), ctypes.c_int64(torch.get_num_threads())):
        raise MemoryError(f"{name}: there is no memory for its work space")


def _argument(value: Tensor | float | ctypes.Array | None) -> object:
    if isinstance(value, Tensor):
        assert value.dtype == torch.float32
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_float(value) if isinstance(value, float) else value


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _new(wanted: object, *shape: int) -> Tensor | None:
    """Allocate an output, or return None if ``wanted`` is None or False."""
    return None if wanted is None or wanted is False else torch.empty(shape)


def _as(like: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    return None if like is None or tensor is None else tensor.to(like.dtype)


def norm_forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    N, H, W, C = x.shape
    residual, out = _new(branch, N, H, W, C), torch.empty(x.shape)
    mean, rstd = torch.empty(N, H, W), torch.empty(N, H, W)
    inputs = map(_float, (x, branch, gate, shift, scale))
    call("norm_forward", *inputs, residual, out, mean, rstd, N, H * W, C, NORM_EPS)
    return _as(x, residual), out.to(x.dtype), mean, rstd


def norm_backward(
    source: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    grad_residual: Tensor | None,
    grad_out: Tensor,
    again: bool,
) -> tuple[Tensor | None, ...]:
    N, H, W, C = source.shape
    grad_x, grad_branch = torch.empty(source.shape), _new(gate, N, H, W, C)
    sums = [_new(wanted, N, C) for wanted in (gate, gate, scale, scale)]
    out = _new(again, *source.shape)
    inputs = map(_float, (source, mean, rstd, shift, scale, branch, gate, grad_residual, grad_out))
    call("norm_backward", *inputs, grad_x, grad_branch, *sums, out, N, H * W, C)
    likes = (source, branch, gate, sums[1], scale, scale, source)
    return tuple(map(_as, likes, (grad_x, grad_branch, *sums, out)))


def scale_forward(x: Tensor, scale: Tensor, base: Tensor | None) -> Tensor:
    N, H, W, C = x.shape
    out = torch.empty(x.shape)
    call("scale_forward", *map(_float, (x, scale, base)), out, N, H * W, C)
    return out.to(x.dtype)


def scale_backward(x: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    N, H, W, C = x.shape
    grad_x, grad_scale, grad_sum = torch.empty(x.shape), torch.empty(N, C), torch.empty(N, C)
    call("scale_backward", *map(_float, (x, scale, grad)), grad_x, grad_scale, grad_sum, N, H * W, C)
    return grad_x.to(x.dtype), grad_scale.to(scale.dtype), grad_sum


def gelu_backward(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    C = x.shape[-1]
    grad_x, grad_sum, out = torch.empty(x.shape), torch.empty(C), torch.empty(x.shape)
    call("gelu_backward", *map(_float, (x, grad)), grad_x, grad_sum, out, x.numel() // C, C)
    return grad_x.to(x.dtype), grad_sum, out.to(x.dtype)


def depthwise_forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    N, H, W, C = x.shape
    out, mean = torch.empty(x.shape), torch.empty(N, C)
    call("depthwise_forward", *map(_float, (x, weight, bias)), out, mean, N, H, W, C)
    return out.to(x.dtype), mean.to(x.dtype)


def depthwise_backward(
    x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, grad_mean: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, H, W, C = x.shape
    grad_x, sums = torch.empty(x.shape), torch.empty(N, 11, C)
    call("depthwise_backward", *map(_float, (x, weight, bias, grad, grad_mean)), grad_x, sums, N, H, W, C)
    taps, grad_bias, passed = (part.sum(0) for part in (sums[:, :9], sums[:, 9], sums[:, 10]))
    return grad_x.to(x.dtype), taps.T.reshape(weight.shape).to(weight.dtype), grad_bias.to(bias.dtype), passed


def text_forward(x: Tensor, context: Tensor, kernel: int, base: Tensor | None = None) -> Tensor:
    if kernel not in TEXT_KERNELS:
        return plain.text_forward(x, context, kernel, base)
    N, H, W, C = x.shape
    out = torch.empty(x.shape)
    call("text_forward", *map(_float, (x, context, base)), out, N, H, W, C, context.shape[1], kernel)
    return out.to(x.dtype)


def text_backward(
    x: Tensor, context: Tensor, grad: Tensor, kernel: int, wants: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    if kernel not in TEXT_KERNELS:
        return plain.text_backward(x, context, grad, kernel, wants)
    N, H, W, C = x.shape
    grad_x, grad_context = _new(wants[0], *x.shape), _new(wants[1], *context.shape)
    inputs = map(_float, (x, context, grad))
    call("text_backward", *inputs, grad_x, grad_context, N, H, W, C, context.shape[1], kernel)
    return _as(x, grad_x), _as(context, grad_context)
