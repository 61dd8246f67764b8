"""Merges trees of plain values, as a file does with the one it extends, and a stage with the config of its run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dico_t2i.config.base import Span

# These keys exclude each other, so a section of them replaces the whole section below it.
SPAN_KEYS = set(Span.model_fields)


def merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of both trees; where both have a value, that of ``top``."""
    result = dict(base)
    for key, value in top.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and not (is_span(old) and is_span(value)):
            value = merged(old, value)
        result[key] = value
    return result


def is_span(section: Mapping[str, Any]) -> bool:
    """Whether a section is a duration or an interval."""
    return bool(section) and set(section) <= SPAN_KEYS
