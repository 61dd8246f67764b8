"""Reads the results of evaluations that the scripts of evals/ write to a run folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FOLDERS = ("evals", "evaluations")  # written by hand-started evaluations, and by jobs that follow the run
_NEEDED = {"step": int, "protocol": dict, "protocol_hash": str, "comparable": bool, "numbers": dict}


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """All results, sorted by protocol and step; of duplicates the newest. Files that are not results are skipped."""
    files = [file for folder in _FOLDERS for file in (run / folder).rglob("*.json")]
    found = {}
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        result = _read(file)
        if result is not None:
            found[result["protocol_hash"], result["step"]] = result
    return sorted(found.values(), key=lambda r: (r["protocol"]["name"], r["protocol_hash"], r["step"]))


def protocol_name(result: Mapping[str, Any]) -> str:
    """The protocol's name and hash; results with the same hash can be compared."""
    return f"{result['protocol']['name']} {result['protocol_hash']}"


def shown_numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a result, without the standard deviations that accompany some metrics."""
    return {k: v for k, v in result["numbers"].items() if isinstance(v, int | float) and not k.endswith("_std")}


def measured(result: Mapping[str, Any], name: str) -> str:
    """A metric with its standard error, as text; empty if the result does not have it."""
    value, error = result["numbers"].get(name), result.get("standard_errors", {}).get(name)
    if not isinstance(value, int | float):
        return ""
    return f"{value:.4f}" + (f" ± {error:.2g}" if isinstance(error, int | float) else "")


def doubts(result: Mapping[str, Any]) -> list[str]:
    """The reasons why a result may not be comparable with others of its protocol."""
    return [str(why) for why in (*result.get("changes", ()), *result.get("doubts", ()))]


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or any(not isinstance(content.get(key), kind) for key, kind in _NEEDED.items()):
        return None
    return content if "name" in content["protocol"] else None
