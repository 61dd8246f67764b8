"""What the data preparation scripts share: folders that are finished or absent, parts, processes."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # it imports torch, which the scripts of cluster/ do not need
    from dico_t2i.data.index import DatasetIndex

SETTINGS = "settings.json"  # of a folder that is filled shard by shard

Result = TypeVar("Result")


def is_finished(out: Path, meta: dict[str, Any]) -> bool:
    """Whether ``out`` already holds the data set that ``meta`` describes; False if it is absent or empty.

    Raises ValueError if it holds anything else: nothing is overwritten.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    index = out / "index.json"
    found = json.loads(index.read_text(encoding="utf-8"))["meta"] if index.is_file() else None
    if found == json.loads(json.dumps(meta)):
        return True
    what = f"a data set with other settings: {found}" if found else "other files"
    raise ValueError(f"--out {out}: holds {what}; remove it or choose another folder")


@contextmanager
def finished_or_absent(out: Path) -> Iterator[Path]:
    """A folder to write to that becomes ``out`` when the block ends without an error.

    It is ``<out>.partial``; what an interrupted run left there is removed first. Raises ValueError if another process
    is writing it.
    """
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = partial / ".lock"
    with lock.open("a") as file:
        if not _lock(file):
            raise _in_use(out)
        for leftover in set(partial.iterdir()) - {lock}:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield partial
        lock.unlink()
        partial.rename(out)


@contextmanager
def held(out: Path, shards: Iterable[int]) -> Iterator[None]:
    """Keep the shards with these numbers, of a folder that was claimed, to this process.

    Raises ValueError if another process is making one of them. Several processes may share a folder.
    """
    with (out / SETTINGS).open("r+") as file:
        if not all(_lock(file, number) for number in shards):
            raise _in_use(out)
        yield


def _lock(file: IO[str], byte: int = 0) -> bool:
    """Lock a byte of a file, until it is closed; False if another process has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # some file systems have no locks
    return True


def _in_use(out: Path) -> ValueError:
    return ValueError(
        f"--out {out}: another process is making the same shards; wait until it ends or stop it, or share the work with"
        " --part"
    )


def claim(out: Path, meta: dict[str, Any], contents: Collection[str] = ()) -> None:
    """Note in ``out``, a folder filled shard by shard, what it will hold.

    contents: keys of the meta data that describe the source's content and not the settings; they may have changed.
    Raises ValueError if it holds something else already: nothing is overwritten, and restarts and parts agree.
    """
    file, wanted = out / SETTINGS, json.loads(json.dumps(meta))
    if file.exists():
        found = settings_of(out)
        names = {*found, *wanted} - set(contents)
        differ = sorted(name for name in names if found.get(name) != wanted.get(name))
        if differ:
            raise ValueError(f"--out {out}: made with another {', '.join(differ)}; choose another folder")
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out}: holds other files; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    part = out / f".settings.{os.getpid()}.part"
    part.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def settings_of(out: Path) -> dict[str, Any]:
    """What was noted in a folder that is filled shard by shard; nothing if it is new."""
    try:
        return dict(json.loads((out / SETTINGS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}


def remove_leftovers(out: Path, shards: Collection[str]) -> None:
    """What killed processes left in ``out`` of the temporary files of these shards."""
    for entry in os.scandir(out):
        if entry.name.endswith(".part") and entry.name[1:].partition(".tar.")[0] + ".tar" in shards:
            Path(entry.path).unlink(missing_ok=True)


def alone(index: DatasetIndex, shard: int) -> DatasetIndex:
    """A data set as if it had this shard only: what a process that reads it has to know."""
    one = slice(shard, shard + 1)
    return type(index)(index.root, index.kind, index.names[one], index.samples[one], index.bytes[one], index.meta)


def in_parallel(work: Callable[..., Result], jobs: Iterable[tuple[Any, ...]], workers: int) -> Iterator[Result]:
    """``work(*job)`` of every job, as they end, by so many processes; jobs are taken as they can be done.

    One worker means this process. An error ends it, after the jobs that run. Raises ValueError if a process dies.
    """
    if workers == 1:
        yield from (work(*job) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # forked threads of libraries hang
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_one_thread) as pool:
        waiting: set[Future[Result]] = set()
        try:
            for job in jobs:
                waiting.add(pool.submit(work, *job))
                if len(waiting) >= 2 * workers:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool:
            raise ValueError("a worker process died (out of memory?); start again with fewer --workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _one_thread() -> None:
    """The processes share the cores: libraries start no threads of their own."""
    import torch

    torch.set_num_threads(1)
