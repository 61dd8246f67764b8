"""Runs the package's programs for the comparisons on shapes: commands that must succeed, and samples of prompts."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.shapes_scene import Scene
from evals.prompt_accuracy import load_samples


def python(*command: str, **environment: str) -> None:
    """Run a program with this Python and these further environment variables. Raises ValueError if it fails."""
    done = subprocess.run([sys.executable, *command], check=False, env={**os.environ, **environment})
    if done.returncode:
        raise ValueError(f"python {' '.join(command)}: it ended with exit status {done.returncode}")


def samples(out: Path, checkpoint: str, asked: Sequence[tuple[str, Scene]], *options: str, **environment: str) -> Any:
    """The images of these prompts, (N, size, size, 3) uint8, in a folder; sampled unless they are there."""
    if not (out / "grid.png").exists():
        listed = out.with_name(f"{out.name}.txt")
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("\n".join(prompt for prompt, _ in asked) + "\n", encoding="utf-8")
        command = ["-m", "dico_t2i", "sample", "--checkpoint", checkpoint, "--prompts", str(listed), "--out", str(out)]
        python(*command, "--batch", "60", *options, **environment)
    return load_samples(out)[0]
