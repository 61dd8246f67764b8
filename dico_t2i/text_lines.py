"""Reads all text that people write: prompts, captions, labels and names, one in each line.

A byte-order mark gives the encoding of a file and does not belong to its text. A line ends only at "\\n", "\\r\\n" or
"\\r"; U+2028, U+0085, the vertical tab and the form feed are characters within a line.
"""

import codecs
import re
from pathlib import Path

MARK = "\ufeff"
_MARKS = (  # longer marks first, since the little-endian mark of UTF-32 starts with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_LINE_END = re.compile(r"\r\n|\n|\r")


def read_lines(path: Path, encoding: str = "utf-8") -> list[str]:
    """The lines of a file. Raises ValueError as ``decode_text`` does, OSError if the file cannot be read."""
    return split_lines(read_text(path, encoding))


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """A file's text without its mark. Raises ValueError as ``decode_text`` does, OSError if it cannot be read."""
    return decode_text(path.read_bytes(), str(path), encoding)


def decode_text(data: bytes, what: str, encoding: str = "utf-8") -> str:
    """Decode bytes by their byte-order mark, or in ``encoding`` if they have none; the mark is removed.

    Raises a one-line ValueError with ``what`` and the place of the first byte that cannot be decoded.
    """
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", encoding))
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        start = len(mark) + error.start
        before = data[len(mark) : start].decode(encoding, errors="replace")
        number, column = len(split_lines(f"{before}.")), len(split_lines(f"{before}.")[-1])
        shown = "0x" + data[start : start + 1].hex() if start < len(data) else "the end"
        raise ValueError(
            f"{what}: line {number}, character {column}: {shown} (byte {start}) is not {encoding} text;"
            " save the file as UTF-8"
        ) from None


def split_lines(text: str) -> list[str]:
    """The lines of a text, without their ends. Marks at the start of lines, as in concatenated files, are removed."""
    lines = _LINE_END.split(text)
    if not lines[-1]:
        lines.pop()  # the last line end does not start a further line
    return [line.removeprefix(MARK) for line in lines]


def check_text(text: str, what: str) -> str:
    """Return the text unchanged. Raises a one-line ValueError if it was made from bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        shown = f"0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"  # as Python escapes bytes
        raise ValueError(f"{what}: character {error.start + 1}: {shown} is not UTF-8 text") from None
    return text


def encoding_of(start: bytes, encoding: str) -> tuple[str, int]:
    """The encoding and length of the mark in a file's first four bytes; ``encoding`` and 0 if there is no mark."""
    return next(((name, len(mark)) for mark, name in _MARKS if start.startswith(mark)), (encoding, 0))
