"""Samples prompts of shapes with the package's programs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.shapes_scene import Scene
from evals.comparison.programs import python
from evals.prompt_accuracy import load_samples


def samples(
    out: Path,
    checkpoint: str,
    asked: Sequence[tuple[str, Scene]],
    *options: str,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """The images of these prompts, (N, size, size, 3) uint8, in a folder; sampled unless they are there."""
    if not (out / "grid.png").exists():
        listed = out.with_name(f"{out.name}.txt")
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("\n".join(prompt for prompt, _ in asked) + "\n", encoding="utf-8")
        command = ["-m", "dico_t2i", "sample", "--checkpoint", checkpoint, "--prompts", str(listed), "--out", str(out)]
        python(*command, "--batch", "60", *options, environment=environment)
    return load_samples(out)[0]
