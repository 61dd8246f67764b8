"""Reads the members of a tar, which may be damaged."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from dico_t2i.data.decode import IMAGE_EXTENSIONS

CHUNK = 1 << 24
_MAX_EXTRA_HEADER = 1 << 20  # the most bytes of a long name or of PAX fields


_PIXELS = {*IMAGE_EXTENSIONS, "moments.npy"}
_DESCRIPTIONS = {"json", "txt", "cls"}
_KNOWN = _PIXELS | _DESCRIPTIONS | {"text.npy", "pooled.npy"}

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # names of compressed tars
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

_EXTRA_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _TarInfo(tarfile.TarInfo):
    """Refuses long names and PAX fields of excessive size before they are read into memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTRA_HEADERS and not 0 <= self.size <= _MAX_EXTRA_HEADER:
            raise tarfile.InvalidHeaderError(  # type: ignore[attr-defined]
                f"an extended header of {self.size} bytes"
            )
        return super()._proc_member(tar)  # type: ignore[misc]


def tar_members(file: BinaryIO, damage: list[str]) -> Iterator[tuple[tarfile.TarInfo, bool]]:
    """The tar's members, each with whether its data is complete. Unreadable places are appended to ``damage``."""
    size = os.fstat(file.fileno()).st_size
    end = 0
    try:
        # Reading continues after zeros and bad headers, to find the members after a damaged part.
        tar = tarfile.open(fileobj=file, mode="r:", ignore_zeros=True, tarinfo=_TarInfo)  # noqa: SIM115
        while (info := tar.next()) is not None:
            if info.size < 0 or info.offset < end:
                raise tarfile.ReadError("impossible size in a header")
            if _any_nonzero(file, end, info.offset):
                damage.append(f"bytes {end} to {info.offset}: no tar members")
            whole = info.offset_data + info.size <= size
            if not whole:
                damage.append(f"byte {info.offset}: {info.name!r} is incomplete")
            yield info, whole
            if not whole:
                return
            end = tar.offset
    except OSError:
        raise
    except Exception as error:  # on hostile headers tarfile raises nearly anything
        damage.append(f"byte {end}: {error}")
        return
    if size < end + tarfile.BLOCKSIZE:
        damage.append(f"byte {end}: no end mark; the file may be incomplete")
    elif _any_nonzero(file, end, size):
        damage.append(f"bytes {end} to {size}: no tar members")


def why_left_out(info: tarfile.TarInfo) -> str | None:
    """Why a member that is not a folder cannot belong to a sample; None if it can."""
    if info.islnk():
        return "hard links (tar them with --hard-dereference)"
    if info.issym():
        return "symbolic links (tar them with --dereference)"
    if not info.isreg():
        return "devices and pipes"
    if info.issparse():
        return "sparse files"
    if info.name.startswith("/"):
        return "absolute names (tar them without --absolute-names)"
    if ".." in info.name.split("/"):
        return "names with .. in them"
    return None if split_name(info.name) else "names without a key or an extension"


def split_name(name: str) -> tuple[str, str] | None:
    """The key and extension in a member's name; None if it lacks one of them, or points out of the folder."""
    name = name.removeprefix("./")
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension or name.startswith("/") or ".." in folder.split("/"):
        return None
    return folder + slash + stem, extension.lower()


def divide_again(members: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Divide the names of neighbours with the same key again, for keys that contain dots.

    "a.1.jpg" and "a.1.txt" are a sample "a.1" if no neighbour has the name of a member of a sample "a", such as
    "a.jpg". Otherwise all names are returned unchanged.
    """
    if any(extension in _KNOWN for _, extension in members):
        return list(members)
    again = [_at_known_extension(key, extension) for key, extension in members]
    pictures = {key for key, extension in again if extension in _PIXELS}
    described = {key for key, extension in again if extension in _DESCRIPTIONS}
    return again if pictures & described else list(members)


def _at_known_extension(key: str, extension: str) -> tuple[str, str]:
    parts = extension.split(".")
    start = next((i for i in range(1, len(parts)) if ".".join(parts[i:]) in _KNOWN), len(parts) - 1)
    return ".".join([key, *parts[:start]]), ".".join(parts[start:])


def key_without_dots(key: str) -> str:
    """A key that all webdataset readers read back: dots in its last part become %2E. Different keys stay different."""
    folder, slash, base = key.rpartition("/")
    return folder + slash + re.sub("%(?=2E|25)", "%25", base).replace(".", "%2E")


def compression(file: BinaryIO) -> str | None:
    """The program that compressed a file; None if the file does not start like a compressed one."""
    start = os.pread(file.fileno(), 8, 0)
    return next((name for mark, name in _COMPRESSED.items() if start.startswith(mark)), None)


def _any_nonzero(file: BinaryIO, start: int, stop: int) -> bool:
    chunks = (os.pread(file.fileno(), min(CHUNK, stop - at), at) for at in range(start, stop, CHUNK))
    return any(chunk.count(0) != len(chunk) for chunk in chunks)
