"""Cleans captions, and recognises those that describe no image."""

import re
import unicodedata

_REMOVED = {"Cc", "Cs", "Co", "Cn"}  # control, surrogates, private use, unassigned; Cf joins letters in many scripts
_URL = re.compile(r"\b(?:https?://|www\.)\S+", re.IGNORECASE)
_FILE_NAME = re.compile(
    r"\S+\.(?:jpe?g|png|gif|webp|bmp|tiff?|heic|raw|cr2|nef|svg|pdf|mp4)"
    r"|(?:img|dsc[nf]?|pict?|image|photo|screenshot|wp|vid|p)[-_ ]?\d[\d_-]{2,}(?:\s?\(\d+\))?",
    re.IGNORECASE,
)
_RUN = re.compile(r"(\S)\1{9,}")
_FEW_CHARACTERS = 4  # a caption with no more different characters than this is odd
_MANY = 24


def check_encoding(name: str) -> None:
    """Raise ValueError for an --encoding that Python does not know."""
    try:
        b"a".decode(name)
    except UnicodeDecodeError:
        pass  # it has several bytes per character
    except LookupError:
        raise ValueError(f"--encoding {name}: unknown; known are utf-8, cp1252, gbk, shift_jis and others") from None


def clean(text: str) -> str:
    """Compose the characters (NFC), remove control characters, and use single spaces for all white space."""
    if not text.isprintable():
        text = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in _REMOVED)
    return " ".join(unicodedata.normalize("NFC", text).split())


def oddity(text: str) -> str | None:
    """Why a clean text cannot describe a picture in any language; None if it can."""
    if not text:
        return "empty"
    if "\N{REPLACEMENT CHARACTER}" in text:
        return "wrongly decoded"
    if not _has_letters(text):
        return "without letters"
    if not _has_letters(_URL.sub("", text)):
        return "only a URL"
    if _FILE_NAME.fullmatch(text):
        return "only a file name"
    if _RUN.search(text) or (len(text) >= _MANY and len(set(text.replace(" ", ""))) <= _FEW_CHARACTERS):
        return "repeated characters"
    return None


def _has_letters(text: str) -> bool:
    return any(c.isalpha() for c in text)
