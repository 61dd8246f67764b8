"""Turns validation errors into lines that name the key and suggest a correction."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from dico_t2i.config.base import Section
from dico_t2i.config.networks import NetworkConfig


def explain(error: ValidationError, root: type[Section]) -> str:
    """Return one line for each error, with the key's path in ``root`` and how to correct it."""
    lines = []
    for item in error.errors():
        loc, section = _resolve(item["loc"], root)
        key = ".".join(str(part) for part in loc)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key" + _suggestion(str(loc[-1]), section)
        elif item["type"] == "union_tag_invalid":
            key, message = f"{key}.kind", f"{item['ctx']['tag']!r} is not one of {item['ctx']['expected_tags']}"
        elif item["type"] != "missing" and item["type"] != "value_error":
            message = f"{message}, found {item['input']!r}{_numeral(item['input'])}"
        lines.append(f"  {key}: {message}" if key else f"  {message}")
    return "\n".join(lines)


# Forms that other languages or YAML 1.1 read as numbers: 1:30, 010, 0x1F, 1_000.
_NUMERAL = re.compile(r"[-+]?(?:\d+(?::\d+)+|0\d+|0[xob][0-9a-fA-F]+|\d[\d_]*_[\d_]*)")


def _numeral(found: Any) -> str:
    """The advice for a number that is not in decimal notation; empty for everything else."""
    return "; write a plain decimal number" if isinstance(found, str) and _NUMERAL.fullmatch(found) else ""


def _resolve(loc: tuple[int | str, ...], section: type[Section]) -> tuple[list[int | str], type[Section]]:
    """Return the keys of pydantic's location, without the kinds it contains, and the section of the last key."""
    keys: list[int | str] = []
    kinds: dict[str, type[Section]] = {}  # where ``kind`` selects the section, the next part of loc is a kind
    for number, part in enumerate(loc):
        if part in kinds:
            section, kinds = kinds[str(part)], {}
            continue
        keys.append(part)
        if isinstance(part, str) and part in section.model_fields and number + 1 < len(loc):
            options = _sections(section.model_fields[part].annotation)
            kinds = {
                o.model_fields["kind"].default: o for o in options if "kind" in o.model_fields and len(options) > 1
            }
            section = options[0] if options else section
    return keys, section


def _sections(annotation: Any) -> list[type[Section]]:
    """Return the sections in a field's type, which may be a section, an optional one, a union or a list."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) else []
    return [section for part in getattr(annotation, "__args__", ()) for section in _sections(part)]


def _suggestion(key: str, section: type[Section]) -> str:
    """Suggest the known key that is most similar to an unknown one."""
    import difflib

    named = issubclass(section, NetworkConfig) and section.variants
    known = [field.alias or name for name, field in section.model_fields.items()] + (["variant"] if named else [])
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; the known keys are: {', '.join(known)}"
