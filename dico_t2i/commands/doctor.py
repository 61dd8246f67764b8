"""Checks a machine for training: each finding is ok, warn or fail, with what to do about it."""

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from dico_t2i.config import Config

_READ_S = 2.0
_SHM_BYTES = 1 << 30
_OPEN_FILES = 4096
_GB = 1e9


@dataclass(frozen=True)
class Finding:
    """The result of one check. remedy: what to do about it; empty if all is well."""

    topic: str
    state: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def examine(config: Config | None, runs: Path) -> Iterator[Finding]:
    """Check the machine and, with a config, everything that the config needs; slow checks come last."""
    yield from _versions()
    yield from _devices(config)
    yield from _communication()
    yield _slurm()
    yield _compiler()
    yield from _limits(config)
    yield _disk(config, runs)
    if config is not None:
        yield from _weights(config)
        for stage in config.stage_configs:
            yield from _guarded("data", partial(_data, stage))


def _versions() -> Iterator[Finding]:
    """Check the interpreter and all required packages."""
    from packaging.requirements import Requirement

    yield Finding("python", "ok", f"{platform.python_version()}, {sys.executable}")
    wrong, found = [], []
    for line in importlib.metadata.requires("dico_t2i") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version or 'missing'} (needs {requirement.specifier})")
        found.append(f"{requirement.name} {version}")
    if wrong:
        yield Finding("packages", "fail", "; ".join(wrong), "pip install --upgrade . in the repository")
    else:
        yield Finding("packages", "ok", ", ".join(found))


def _devices(config: Config | None) -> Iterator[Finding]:
    import torch

    yield Finding("torch", "ok", f"{torch.__version__}, built for CUDA {torch.version.cuda or '- (CPU only)'}")
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            remedy = "install a torch built for the driver's CUDA (nvidia-smi shows it); see CUDA_VISIBLE_DEVICES"
            yield Finding("GPUs", "fail", "there is a driver, but torch sees no GPU", remedy)
            return
        bf16 = config is not None and config.train.precision == "bf16"
        remedy = "train.precision=fp32: bf16 is slow on CPUs" if bf16 else "small runs only"
        yield Finding("GPUs", "warn", f"none; {os.cpu_count()} CPU cores", remedy)
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        properties = torch.cuda.get_device_properties(number)
        compute = f"compute {properties.major}.{properties.minor}"
        text = f"{properties.name}, {total / _GB:.0f} GB, {free / _GB:.0f} free, {compute}"
        busy = free < 0.9 * total
        remedy = "another process uses its memory (see nvidia-smi)" if busy else ""
        yield Finding(f"GPU {number}", "warn" if busy else "ok", text, remedy)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("bf16", "ok", "in hardware")
    else:
        yield Finding("bf16", "fail", "not in hardware", "train.precision=fp32, or GPUs of compute 8.0 and above")


def _communication() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        here = dist.is_nccl_available()
        version = ".".join(map(str, torch.cuda.nccl.version())) if here else "not in this torch"
        yield Finding("NCCL", "ok" if here else "fail", version, "" if here else "install a torch with NCCL")
        triton = _version("triton")
        yield Finding("triton", "ok" if triton else "warn", triton or "missing", "" if triton else "pip install triton")
    gloo = dist.is_gloo_available()
    yield Finding("gloo", "ok" if gloo else "fail", "here" if gloo else "not in this torch")
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        remedy = "several nodes: set MASTER_ADDR to an address, or put the name into /etc/hosts"
        yield Finding("host name", "warn", f"{socket.gethostname()} does not resolve", remedy)
    else:
        yield Finding("host name", "ok", socket.gethostname())


def _slurm() -> Finding:
    if shutil.which("sbatch") is None:
        return Finding("SLURM", "ok", "not installed: start with torchrun, or cluster/launch.py --local")
    if shutil.which("scontrol") is None:
        return Finding(
            "SLURM", "warn", "sbatch without scontrol", "put all SLURM commands on PATH; scontrol requeues jobs"
        )
    job = os.environ.get("SLURM_JOB_ID")
    return Finding("SLURM", "ok", f"{shutil.which('sbatch')}{f', in job {job}' if job else ''}")


def _compiler() -> Finding:
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        return Finding("C compiler", "warn", "none", "apt-get install gcc: it compiles the operators for CPUs")
    return Finding("C compiler", "ok", compiler)


def _limits(config: Config | None) -> Iterator[Finding]:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield Finding("/dev/shm", "fail", "does not exist", "mount it: data workers pass batches through it")
    else:
        usage = shutil.disk_usage(shared)
        small = usage.free < _SHM_BYTES and (config is None or config.data.workers > 0)
        remedy = "docker run --shm-size=8g (or --ipc=host); or data.workers=0" if small else ""
        text = f"{usage.free / _GB:.1f} of {usage.total / _GB:.1f} GB free"
        yield Finding("/dev/shm", "warn" if small else "ok", text, remedy)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft < _OPEN_FILES
    remedy = f"ulimit -n {min(hard, 1 << 16) if hard > 0 else 1 << 16}" if few else ""
    yield Finding("open files", "warn" if few else "ok", f"at most {soft}", remedy)


def _disk(config: Config | None, runs: Path) -> Finding:
    folder = next(parent for parent in (runs.absolute(), *runs.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    text = f"{free / _GB:.1f} GB free in {folder}"
    if not os.access(folder, os.W_OK):
        return Finding("runs folder", "fail", f"{folder} cannot be written", "give a different folder with --runs")
    if config is None:
        return Finding("runs folder", "ok", text)
    one = _checkpoint_bytes(config)
    kept = config.checkpoint.keep_last + 1  # there is one more while the next is written
    text += f"; a checkpoint takes {one / _GB:.2f} GB, {kept} of them {kept * one / _GB:.2f}"
    if free < 2 * one:
        return Finding("runs folder", "fail", text, "make room, or give a different folder with --runs")
    if free < kept * one:
        return Finding("runs folder", "warn", text, "make room, or lower checkpoint.keep_last")
    return Finding("runs folder", "ok", text)


def _checkpoint_bytes(config: Config) -> int:
    """The size of a checkpoint: fp32 weights, two moments, and the averages."""
    from dico_t2i.models import count_parameters

    return 4 * (3 + len(config.optimizer.ema)) * count_parameters(config.model)


def _weights(config: Config) -> Iterator[Finding]:
    from dico_t2i.encoders import MissingModelError, find_autoencoder
    from dico_t2i.encoders.conditioner import find_fitting_text_encoder

    wanted: list[tuple[str, Callable[[], list[Path]]]] = [("autoencoder", lambda: find_autoencoder(config.autoencoder))]
    if config.model.condition == "text":
        wanted.append(("text encoder", lambda: find_fitting_text_encoder(config)))
    for topic, find in wanted:
        try:
            files = find()
        except MissingModelError as error:
            places, _, remedy = str(error).partition("\nOn a machine")
            fetch = "dico prefetch --config FILE --out DIR on a machine with network access, then DICO_WEIGHTS=DIR"
            own = "set the key to a folder with the files, or to a hub id"
            yield Finding(topic, "fail", places.removesuffix(own), fetch if remedy else own)
        except ValueError as error:
            yield Finding(topic, "fail", str(error), "correct the config")
        else:
            none = "none needed (pixels)" if topic == "autoencoder" else "none needed (seeded: random, untrained)"
            folders = ", ".join(dict.fromkeys(str(file.parent) for file in files))
            yield Finding(topic, "ok", folders or none)


def _data(config: Config) -> Iterator[Finding]:
    """Check the shards, and measure how fast the config's loader reads them."""
    from dico_t2i.data.batches import Wanted
    from dico_t2i.data.checks import check_data
    from dico_t2i.data.loader import Share, make_loader
    from dico_t2i.data.sources import load_data, make_order

    bare = [root for root in map(Path, config.data.paths) if root.is_dir() and not (root / "index.json").exists()]
    for root in bare:
        yield Finding(
            "data",
            "warn",
            f"{root} has no index yet",
            f"python -m dico_t2i.data {root}, or let the start of training make it",
        )
    if bare:
        return
    index = load_data(config.data)
    check_data(config, index)
    size = index.bytes.sum() / len(index)
    where = ", ".join(config.data.paths)
    yield Finding("data", "ok", f"{where}: {len(index):,} samples in {len(index.names)} shards, {index.kind}")
    order = make_order(config.data, index, config.seed, config.train.global_batch)
    micro, _ = config.batching(1)
    batches = iter(
        make_loader(
            config.data,
            index,
            order,
            Share(config.train.global_batch, micro),
            Wanted(config.model.condition, config.model.num_classes),
            seed=config.seed,
        )
    )
    next(batches)  # wait until the workers have started
    samples, bad, started = 0, 0, time.monotonic()
    while time.monotonic() - started < _READ_S:
        batch = next(batches)
        samples, bad = samples + len(batch.positions), bad + len(batch.bad)
    rate = samples / (time.monotonic() - started)
    text = f"{rate:,.0f} samples/s, {rate * size / 1e6:,.1f} MB/s by one rank with {config.data.workers} workers"
    yield Finding("reading", "ok", text, "")
    if bad:
        yield Finding("samples", "warn", f"{bad} of {samples} could not be used", f"python data_prep/verify.py {where}")


def _guarded(topic: str, work: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of ``work``; a ValueError becomes a finding."""
    try:
        yield from work()
    except ValueError as error:
        yield Finding(topic, "fail", str(error), "see data.path, and docs/data.md")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
