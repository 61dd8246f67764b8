"""Walking a tar, also a damaged one."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

CHUNK = 1 << 24
_MAX_EXTRA_HEADER = 1 << 20  # bytes of a long name or of PAX fields; more is no name


_EXTRA_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _TarInfo(tarfile.TarInfo):
    """Refuses long names and PAX fields that claim too much, before they are read into memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTRA_HEADERS and not 0 <= self.size <= _MAX_EXTRA_HEADER:
            raise tarfile.InvalidHeaderError(  # type: ignore[attr-defined]
                f"an extended header of {self.size} bytes"
            )
        return super()._proc_member(tar)  # type: ignore[misc]


def tar_members(file: BinaryIO, damage: list[str]) -> Iterator[tuple[tarfile.TarInfo, bool]]:
    """The tar's members with whether their data is whole. Appends to ``damage`` what could not be read."""
    size = os.fstat(file.fileno()).st_size
    end = 0
    try:
        # Reading on behind zeros and bad headers finds what lies beyond a damaged stretch.
        tar = tarfile.open(fileobj=file, mode="r:", ignore_zeros=True, tarinfo=_TarInfo)  # noqa: SIM115
        while (info := tar.next()) is not None:
            if info.size < 0 or info.offset < end:
                raise tarfile.ReadError("impossible size in a header")
            if _any_nonzero(file, end, info.offset):
                damage.append(f"bytes {end} to {info.offset}: no tar members")
            whole = info.offset_data + info.size <= size
            if not whole:
                damage.append(f"byte {info.offset}: {info.name!r} is cut")
            yield info, whole
            if not whole:
                return
            end = tar.offset
    except OSError:
        raise
    except Exception as error:  # a hostile header makes tarfile raise nearly anything
        damage.append(f"byte {end}: {error}")
        return
    if size < end + tarfile.BLOCKSIZE:
        damage.append(f"byte {end}: no end mark; the file may be cut")
    elif _any_nonzero(file, end, size):
        damage.append(f"bytes {end} to {size}: no tar members")


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member's name; None if it is no sample's, or reaches out of the folder."""
    name = name.removeprefix("./")
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension or name.startswith("/") or ".." in folder.split("/"):
        return None
    return folder + slash + stem, extension.lower()


def _any_nonzero(file: BinaryIO, start: int, stop: int) -> bool:
    chunks = (os.pread(file.fileno(), min(CHUNK, stop - at), at) for at in range(start, stop, CHUNK))
    return any(chunk.count(0) != len(chunk) for chunk in chunks)
