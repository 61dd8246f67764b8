"""Reads a sample's captions, label and stored text features from its members."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import numpy as np

from dico_t2i.data.decode import check_finite, decode_rows
from dico_t2i.data.errors import SampleError
from dico_t2i.text_lines import decode_text

TEXT, POOLED = "text.npy", "pooled.npy"  # features of each caption: float16 (captions, T, dim), (captions, pooled_dim)


_MAX_LABEL_DIGITS = 9


_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def member_of(sample: dict[str, Any], *extensions: str) -> bytes:
    """The first of these members that a sample has. Raises SampleError if it has none."""
    for extension in extensions:
        if extension in sample:
            return sample[extension]
    raise SampleError("", "", f"has no {' or '.join(extensions)}")


class Caption(NamedTuple):
    """A caption with its source, such as "alt" or "short", as named in the sample's json; "" without a name."""

    text: str
    source: str = ""


def captions_of(sample: dict[str, Any]) -> list[str]:
    """The texts of ``sourced_captions``."""
    return [caption.text for caption in sourced_captions(sample)]


def sourced_captions(sample: dict[str, Any]) -> list[Caption]:
    """The captions of a sample that are not blank, from its json or else its txt. Raises SampleError if there is none.

    ``captions_in`` decides what is a caption. ``caption_sources`` in the json, an equally long list, names sources.
    """
    try:
        about = json.loads(sample.get("json", b"{}"))
        found, other = captions_in(about.get("captions"), about.get("caption_sources"), sample.get("txt"))
        captions = [Caption(_well_formed(text), source) for text, source in found if text.strip()]
        if not captions and other:
            raise TypeError(f"found {', '.join(other)}")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SampleError("", "", f"captions cannot be read: {error}") from None
    if not captions:
        raise SampleError("", "", "has no caption" if found or "captions" in about else "has no captions and no txt")
    return captions


def captions_in(
    value: Any, sources: Any = None, txt: bytes | None = None, encoding: str | None = None
) -> tuple[list[Caption], list[str]]:
    """The captions in a value of unknown origin, and descriptions of everything else in it.

    A text is a caption, and so is each text in a list. Null, numbers, objects and nested lists are not captions and are
    never converted to text. If all captions are blank, the caption is txt, decoded by ``decode_caption``. Training,
    data preparation and evaluations all use this function. Raises ValueError if txt is not text.
    """
    items = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    named = sources if isinstance(sources, list | tuple) and len(sources) == len(items) else [""] * len(items)
    pairs = zip(items, named, strict=True)
    captions = [Caption(item, str(source)) for item, source in pairs if isinstance(item, str)]
    other = [_kind(item) for item in items if not isinstance(item, str)]
    if txt is not None and not any(caption.text.strip() for caption in captions):
        return [Caption(decode_caption(txt, encoding), "txt")], other
    return captions, other


def _kind(value: Any) -> str:
    """A description of a value from JSON or from a table."""
    if value is None or value != value:  # tables of numbers mark a missing value by NaN
        return "null"
    if isinstance(value, bool | int | float):
        return "a number"
    return "a list" if isinstance(value, list | tuple) else "an object"


def decode_caption(data: bytes, encoding: str | None = None) -> str:
    """Decode text by its byte-order mark, else in ``encoding``, else in UTF-8 or Windows-1252.

    Windows-1252 includes Latin-1. Raises ValueError for other bytes.
    """
    try:
        text = decode_text(data, "txt", encoding or "utf-8")
    except ValueError:
        if encoding is not None:
            raise
        text = data.decode("cp1252")
    if encoding is None and _CONTROL.search(text):
        raise ValueError("not text in UTF-8, UTF-16 or Windows-1252")
    return text


def _well_formed(text: str) -> str:
    """Replace lone surrogates, which JSON can contain but no tokenizer accepts."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def stored_features(sample: dict[str, Any], captions: int) -> tuple[np.ndarray, ...]:
    """The stored text features, with one row for each caption. Raises SampleError."""
    parts = tuple(decode_rows(member_of(sample, name), name) for name in (TEXT, POOLED))
    for part, name, axes in zip(parts, (TEXT, POOLED), (3, 2), strict=True):
        if part.ndim != axes or len(part) != captions:
            raise SampleError("", "", f"{name} has shape {part.shape}, but there are {captions} captions")
        check_finite(part, name)
    return parts


def label_of(sample: dict[str, Any], classes: int | None) -> int:
    """The class in the sample's cls member; always 0 if there are no classes. Raises SampleError."""
    if classes == 0:
        return 0
    digits = member_of(sample, "cls").strip()
    if not digits.isdigit() or len(digits) > _MAX_LABEL_DIGITS:
        raise SampleError("", "", f"cls is not a class number: {digits[:20]!r}")
    if classes is not None and int(digits) >= classes:
        raise SampleError("", "", f"cls is {int(digits)}, but model.num_classes ends at {classes - 1}")
    return int(digits)
