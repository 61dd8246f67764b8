"""One rank of a training job: it trains and, if it fails, writes a note with the reason for the job.

    python -m cluster.rank FOLDER RUNS START     (started by cluster/supervisor.py)

FOLDER holds the resolved config.yaml; notes are written to FOLDER/errors-START/<rank>.json.
"""

import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path

from dico_t2i.command import USER_ERROR

LOCK_PATIENCE_S = 120.0  # the previous start of a requeued job may still be ending
START_MARK = "-- start "  # the first line of each start in a log


def main(folder: Path, runs: Path, start: int) -> int:
    """Train; returns the exit code."""
    notes = folder / f"errors-{start}"
    print(f"{START_MARK}{start}", flush=True)
    try:
        from dico_t2i.config import load_config
        from dico_t2i.training.ranks.distributed import leave_world
        from dico_t2i.training.trainer import train

        config, patience = load_config(folder / "config.yaml"), LOCK_PATIENCE_S if start else 0.0
        code = train(config, runs, patience)
        leave_world()
        return code
    except ValueError as error:  # an unusable config, data set, model or checkpoint; the message suffices
        _note(notes, USER_ERROR, str(error))
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except BaseException as error:
        if not isinstance(error, SystemExit):
            _note(notes, 1, traceback.format_exc())
        raise


def _note(notes: Path, code: int, error: str) -> None:
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    note = {"rank": rank, "host": socket.gethostname(), "time": time.time(), "code": code, "error": error.strip()}
    notes.mkdir(parents=True, exist_ok=True)
    (notes / f"{rank}.json").write_text(json.dumps(note))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
