"""The one reader of text that people write: prompts, captions, labels and names, a line each.

A byte-order mark says how a file is encoded and is no part of its text. A line ends at "\\n", "\\r\\n" or "\\r" and
nowhere else: U+2028, U+0085, the vertical tab and the form feed are characters of a line.
"""

import codecs
import re
from pathlib import Path

MARK = "\ufeff"
_MARKS = (  # the longer ones first: UTF-32's little-endian mark begins with UTF-16's
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
    """Text of bytes, without marks: encoded as their byte-order mark says, or in ``encoding`` where there is none.

    Raises ValueError, in one line, with ``what`` and the place of the first byte that is no text.
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
    """The lines of a text, without their ends; a mark at the start of a line, as joined files have it, is removed."""
    lines = _LINE_END.split(text)
    if not lines[-1]:
        lines.pop()  # the last line end is one, not the beginning of a further line
    return [line.removeprefix(MARK) for line in lines]


def check_text(text: str, what: str) -> str:
    """The text itself. Raises ValueError, in one line, if it was made of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        shown = f"0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"  # as Python escapes bytes
        raise ValueError(f"{what}: character {error.start + 1}: {shown} is not UTF-8 text") from None
    return text


def encoding_of(start: bytes, encoding: str) -> tuple[str, int]:
    """The encoding that a file's first four bytes name with a mark, and the mark's length; else ``encoding`` and 0."""
    return next(((name, len(mark)) for mark, name in _MARKS if start.startswith(mark)), (encoding, 0))
