"""The names of a data set's shards, kept as one array of bytes: a list of 1e6 texts needs five times the memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

_LONGEST = 4096  # bytes; no path is longer


class Names(Sequence[str]):
    """An unchangeable list of names.

    encoded: dtype S (n,), the names in UTF-8.
    """

    def __init__(self, encoded: np.ndarray) -> None:
        self.encoded = encoded

    @staticmethod
    def of(names: Iterable[str]) -> Names:
        """Raises ValueError for a name that cannot be that of a file."""
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        if any(len(name) > _LONGEST or b"\0" in name for name in encoded):
            raise ValueError("the name of a shard is too long or has a zero byte")
        return Names(np.array(encoded, dtype="S"))

    @staticmethod
    def joined(parts: Iterable[tuple[str, Names]]) -> Names:
        """The names of several lists, each preceded by a prefix."""
        return Names(np.concatenate([np.char.add(prefix.encode(), names.encoded) for prefix, names in parts]))

    def __len__(self) -> int:
        return len(self.encoded)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Names: ...
    def __getitem__(self, at: int | slice) -> str | Names:
        return Names(self.encoded[at]) if isinstance(at, slice) else _decode(self.encoded[at].item())

    def __iter__(self) -> Iterator[str]:
        return map(_decode, self.encoded.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    def problem(self) -> str | None:
        """Why these cannot be the names of different files in a folder; None if they can."""
        encoded = self.encoded
        outside = np.isin(encoded, [b"", b".", b".."]) | (np.char.find(encoded, b"/") >= 0)
        if outside.any():
            return f"the shard name {self[int(outside.argmax())]!r} is not a plain file name"
        in_order = bool((encoded[1:] > encoded[:-1]).all())
        return None if in_order or len(np.unique(encoded)) == len(encoded) else "a shard name is listed twice"


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
