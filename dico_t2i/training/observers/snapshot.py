"""Records each start of a run in runs/<name>/starts/: command, code, packages and machine."""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from dico_t2i.files import write_atomically
from dico_t2i.training.ranks.distributed import World

_VARIABLES = ("NCCL_", "GLOO_", "OMP_", "CUDA_VISIBLE", "TORCH_", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART")
_LAUNCHER = "DICO_LAUNCHED_BY"  # set by cluster/ to the command that the user typed


def write_snapshot(folder: Path, world: World) -> None:
    """Write <number>.json and, if the code differs from its commit, <number>.patch; only rank 0 calls this."""
    folder.mkdir(exist_ok=True)
    number = f"{len(list(folder.glob('*.json'))):04d}"
    source = Path(__file__).resolve().parents[2]
    patch = _git(source, "diff", "HEAD")
    if patch:
        write_atomically(folder / f"{number}.patch", patch.encode())
    cuda = world.device.type == "cuda"
    started = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": os.environ.get(_LAUNCHER) or shlex.join(sys.argv),
        "commit": _git(source, "rev-parse", "HEAD"),
        "changed": bool(patch),
        "untracked": (_git(source, "ls-files", "--others", "--exclude-standard") or "").splitlines(),
        "host": socket.gethostname(),
        "ranks": world.size,
        "device": torch.cuda.get_device_name(world.device) if cuda else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(_VARIABLES)},
        "packages": _packages(),
    }
    write_atomically(folder / f"{number}.json", json.dumps(started, indent=1).encode())


def process_age_s() -> float:
    """The seconds since this process began; 0 where the system does not tell."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _packages() -> dict[str, str]:
    """Name and version of each installed package."""
    found = (_name_and_version(distribution) for distribution in importlib.metadata.distributions())
    return dict(sorted(pair for pair in found if pair))


def _name_and_version(distribution: importlib.metadata.Distribution) -> tuple[str, str] | None:
    """Those in the header of a package's metadata; to parse all of it for all packages takes a quarter of a second."""
    header = (distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or "").partition("\n\n")[0]
    fields = dict(re.findall(r"^(Name|Version): *(\S+)", header, re.MULTILINE))
    return (fields["Name"], fields["Version"]) if len(fields) == 2 else None


def _git(source: Path, *arguments: str) -> str | None:
    """The output of git for the source; None without git or outside a repository."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(source), *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.rstrip("\n") if answer.returncode == 0 else None
