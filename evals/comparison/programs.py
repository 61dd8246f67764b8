"""Runs the project's programs as commands that must succeed."""

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path


def python(*command: str, environment: Mapping[str, str] | None = None, log: Path | None = None) -> None:
    """Run a program with this Python and these further environment variables.

    log: the file that its output is added to; with none it is shown. Raises ValueError if the program fails.
    """
    everything = {**os.environ, **(environment or {})}
    with log.open("ab") if log else nullcontext() as output:
        errors = subprocess.STDOUT if output else None
        done = subprocess.run([sys.executable, *command], check=False, env=everything, stdout=output, stderr=errors)
    if done.returncode:
        where = f"; its output is in {log}" if log else ""
        raise ValueError(f"python {' '.join(command)}: it ended with exit status {done.returncode}{where}")
