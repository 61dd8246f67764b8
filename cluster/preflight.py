"""Prints, before the ranks of a job start, what a node has, as one line of JSON.

python -m cluster.preflight FOLDER GPUS     (started by cluster/supervisor.py, once on each node)
"""

import hashlib
import importlib.metadata
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "webdataset", "safetensors", "pydantic")
SOURCE = Path(__file__).resolve().parents[1] / "dico_t2i"


def inspect(folder: Path, gpus: int) -> dict[str, Any]:
    """The node's Python, packages, code and GPUs, and whether it sees the run folder."""
    return {
        "host": socket.gethostname(),
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: _version(name) for name in PACKAGES},
        "code": _hash_of_code(),
        "gpus": _gpus() if gpus else 0,
        "sees_run": (folder / "config.yaml").exists(),
    }


def problems(nodes: Sequence[dict[str, Any]], gpus: int) -> list[str]:
    """The problems of training on these nodes, one line each."""
    found = []
    for node in nodes:
        host = node["host"]
        missing = [name for name in PACKAGES if node[name] is None]
        if missing:
            found.append(f"{host}: {', '.join(missing)} not installed for its Python; see cluster.python and .setup")
        if not node["sees_run"]:
            found.append(f"{host}: does not see the run folder; runs must be on a file system that all nodes share")
        if node["gpus"] < gpus:
            found.append(f"{host}: {node['gpus']} GPUs visible, {gpus} needed; exclude the node, or have it repaired")
    for key in ("python", *PACKAGES, "code"):
        values = {str(node[key]) for node in nodes}
        if len(values) > 1:
            each = ", ".join(f"{node['host']} has {node[key]}" for node in nodes)
            found.append(f"{key} differs between nodes: {each}; use one environment on a shared file system")
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hash_of_code() -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return len(listed.splitlines())


if __name__ == "__main__":
    print(json.dumps(inspect(Path(sys.argv[1]), int(sys.argv[2]))), flush=True)
