"""Results of evaluations in a run folder, as the scripts of evals/ write them."""

import json
from pathlib import Path
from typing import Any

_FOLDERS = ("evals", "evaluations")  # by hand, and by a job that follows the run
_NEEDED = {"step": int, "protocol": dict, "protocol_hash": str, "comparable": bool, "numbers": dict}


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """All results, by protocol and step; of the same one in two places, the newer. What is no result is passed over."""
    files = [file for folder in _FOLDERS for file in (run / folder).rglob("*.json")]
    found = {}
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        result = _read(file)
        if result is not None:
            found[result["protocol_hash"], result["step"]] = result
    return sorted(found.values(), key=lambda r: (r["protocol"]["name"], r["protocol_hash"], r["step"]))


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or any(not isinstance(content.get(key), kind) for key, kind in _NEEDED.items()):
        return None
    return content if "name" in content["protocol"] else None
