"""The meaning of a sample's members: its captions, label and stored text features."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from dico_t2i.data.decode import check_finite, decode_rows
from dico_t2i.data.errors import SampleError

TEXT, POOLED = "text.npy", "pooled.npy"  # features of each caption: float16 (captions, T, dim), (captions, pooled_dim)


_MAX_LABEL_DIGITS = 9


_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def member_of(sample: dict[str, Any], *extensions: str) -> bytes:
    """The first of these members that a sample has. Raises SampleError."""
    for extension in extensions:
        if extension in sample:
            return sample[extension]
    raise SampleError("", "", f"has no {' or '.join(extensions)}")


def captions_of(sample: dict[str, Any]) -> list[str]:
    """The captions in the sample's json that are not blank, or else its txt as one. Raises SampleError if none are."""
    try:
        found = json.loads(sample.get("json", b"{}")).get("captions")
        if found is None:
            found = [_text(member_of(sample, "txt"))]
        if not isinstance(found, list):
            raise TypeError("captions is not a list")
        captions = [text if text.isascii() else _well_formed(text) for text in found if text.strip()]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SampleError("", "", f"captions cannot be read: {error}") from None
    if not captions:
        raise SampleError("", "", "has no caption")
    return captions


def _text(data: bytes) -> str:
    """Text in UTF-8 or UTF-16, by their byte order marks if they have any, or else in Windows-1252, Latin-1's superset.

    Raises ValueError for other bytes.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252")
    if _CONTROL.search(text):
        raise ValueError("not text in UTF-8, UTF-16 or Windows-1252")
    return text


def _well_formed(text: str) -> str:
    """The text without lone surrogates, which JSON can hold and no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def stored_features(sample: dict[str, Any], captions: int) -> tuple[np.ndarray, ...]:
    """The stored text features, one row a caption. Raises SampleError."""
    parts = tuple(decode_rows(member_of(sample, name), name) for name in (TEXT, POOLED))
    for part, name, axes in zip(parts, (TEXT, POOLED), (3, 2), strict=True):
        if part.ndim != axes or len(part) != captions:
            raise SampleError("", "", f"{name} is of shape {part.shape}, for {captions} captions")
        check_finite(part, name)
    return parts


def label_of(sample: dict[str, Any], classes: int | None) -> int:
    """The class in the sample's cls member. Raises SampleError."""
    digits = member_of(sample, "cls").strip()
    if not digits.isdigit() or len(digits) > _MAX_LABEL_DIGITS:
        raise SampleError("", "", f"cls is no class number: {digits[:20]!r}")
    if classes is not None and int(digits) >= classes:
        raise SampleError("", "", f"cls is {int(digits)}, but model.num_classes ends at {classes - 1}")
    return int(digits)
