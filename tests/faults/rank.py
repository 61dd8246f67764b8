"""A rank of a job of the harness: ``dico train``, with what it is given to train on recorded.

``python -m tests.faults.rank FOLDER OPERATION BATCHES ARGUMENT...``: with an operation above 0, it kills itself before
it; with a number of micro-batches above 0, it takes no more of them, and waits to be killed.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from dico_t2i.cli import main as dico
from dico_t2i.training import upload
from dico_t2i.training.ahead import Ahead


def main(folder: Path, operation: int, batches: int, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    upload._RETRY_WAIT_S = 0.01
    _record_batches(folder / f"rank-{os.environ['RANK']}.jsonl", batches)
    if operation:
        config = arguments[arguments.index("--config") + 1]
        name = yaml.safe_load(Path(config).read_text())["name"]
        _die_in_save(Path(arguments[arguments.index("--runs") + 1]) / name / "checkpoints", operation)
    dico(arguments)


def _record_batches(record: Path, most: int = 0) -> None:
    take = Ahead.take
    taken = 0

    def recorded(ahead: Ahead[Any, Any]) -> tuple[Any, Any]:
        """What is about to be trained on; more may have been fetched."""
        nonlocal taken
        while most and taken == most:
            time.sleep(0.1)
        batch, inputs = take(ahead)
        taken += 1
        with record.open("a") as file:
            file.write(json.dumps({"positions": batch.positions.tolist(), "keys": batch.keys}) + "\n")
        return batch, inputs

    Ahead.take = recorded  # type: ignore[method-assign]


def _die_in_save(checkpoints: Path, operation: int) -> None:
    """SIGKILL to this process before its n-th operation on what it saves; reading old checkpoints is none."""
    old = {str(path) for path in checkpoints.glob("step-*")}
    done = 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        path = str(arguments[0])
        if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # relative to an open folder
            path = f"{Path(f'/proc/self/fd/{arguments[1]}').readlink()}/{path}"
        reads_old = event == "open" and (str(Path(path).parent) in old or path in old or path.endswith("latest"))
        if not path.startswith(f"{checkpoints}/") or reads_old:
            return
        done += 1
        if done == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
