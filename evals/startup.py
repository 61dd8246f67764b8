"""Measures what a rank costs until it has made its first step: seconds, CPU seconds and memory.

    python evals/startup.py --config configs/dico_s_t2i.yaml --ranks 2 data.path=data/shapes train.precision=fp32
    python evals/startup.py --imports

The ranks are processes of ``dico train`` on this machine, and are stopped after a few steps. "Own" memory is what a
rank and its data workers hold for themselves; "shared" memory is that of libraries' files, which all ranks of a node
use together, so that N ranks take about N times the first and once the second. --imports imports the libraries one
after the other in a new process, as a rank does.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dico_t2i.command import positive, run, script_parser
from dico_t2i.config import load_config
from dico_t2i.runs.log import json_lines

IMPORTED = (
    *("numpy", "torch", "deepspeed", "dico_t2i.training.trainer", "tokenizers"),  # what a rank imports, and then
    *("torch._dynamo", "transformers.models.clip.modeling_clip", "diffusers.models.autoencoders.autoencoder_kl"),
)
ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 1800
MB = 1 << 10  # /proc counts in kB

_IMPORT = """
import importlib, json, sys, time
from evals.startup import memory
for name in sys.argv[1:]:
    started, before = time.process_time(), memory("self")
    importlib.import_module(name)
    seconds, after = time.process_time() - started, memory("self")
    print(json.dumps([name, seconds, after[0] - before[0], after[1] - before[1], len(sys.modules)]))
"""


def memory(process: int | str) -> tuple[float, float]:
    """The memory of a process in MB: its own, and that of files which other processes can share."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return (sizes["Pss_Anon"] + sizes["Pss_Shmem"]) / MB, (sizes["Rss"] - sizes["Anonymous"]) / MB


def cpu_s(process: int) -> float:
    """The CPU seconds of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(process: int) -> list[int]:
    """The child processes of a process, such as data workers."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def measure(config: Path, ranks: int, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Start a run, and return the costs of each rank after the first step."""
    name = load_config(config, overrides).name
    with tempfile.TemporaryDirectory(prefix="dico-startup-") as folder:
        command = [sys.executable, "-m", "dico_t2i", "train", "--config", str(config), "--runs", folder, *overrides]
        with socket.create_server(("127.0.0.1", 0)) as probe:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(ranks)}
        log = Path(folder, "output.txt")
        with log.open("wb") as output:
            environments = [{**os.environ, **place, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(ranks)]
            processes = [subprocess.Popen(command, env=e, stdout=output, stderr=output) for e in environments]
        try:
            start_s = _first_step(Path(folder, name, "metrics.jsonl"), processes, log)
            return [_costs(number, process.pid, start_s) for number, process in enumerate(processes)]
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait()


def _first_step(metrics: Path, processes: Sequence[subprocess.Popen[bytes]], log: Path) -> float:
    """Wait for the first step; returns the seconds from the start of rank 0 until then."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        found = [line["start_s"] for line in (json_lines(metrics) if metrics.exists() else ()) if "start_s" in line]
        if found:
            return float(found[0])
        time.sleep(0.1)
    raise ValueError(f"the run made no step; give it more than a few. Its output ends with\n{log.read_text()[-2000:]}")


def _costs(rank: int, process: int, start_s: float) -> dict[str, Any]:
    own, shared = memory(process)
    workers = [memory(child)[0] for child in children(process)]
    seconds = {"start_s": start_s} if rank == 0 else {}
    return {"rank": rank, **seconds, "cpu_s": cpu_s(process), "own": own, "workers": sum(workers), "shared": shared}


def imports() -> Iterator[list[Any]]:
    """Name, CPU seconds, own and shared MB, and number of modules so far of each import, in one new process."""
    answer = subprocess.run(
        [sys.executable, "-c", _IMPORT, *IMPORTED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return (json.loads(line) for line in answer.stdout.splitlines() if line.startswith('["'))


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--imports", action="store_true", help="measure imports instead of a run")
    parser.add_argument("--config", type=Path, help="a config whose run makes at least a few steps")
    parser.add_argument("--ranks", type=positive, default=1, help="number of ranks (default: 1)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the config")
    arguments = parser.parse_args(argv)
    if arguments.imports:
        found: list[Any] = list(imports())
        table = _table(("import", "CPU s", "own MB", "shared MB", "modules"), found)
    elif arguments.config is None:
        raise ValueError("--config: give the config of the run to measure, or use --imports")
    else:
        found = measure(arguments.config, arguments.ranks, arguments.overrides)
        columns = ("rank", "CPU s", "own MB", "of its workers, MB", "shared MB")
        table = _table(columns, [[row[k] for k in ("rank", "cpu_s", "own", "workers", "shared")] for row in found])
    console = Console()
    console.print(table)
    if not arguments.imports:
        console.print(f"from the start of rank 0 to its first step: {found[0]['start_s']:.1f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
