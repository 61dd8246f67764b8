"""Shared parts of the data preparation scripts: folders that are complete or absent, parts of the work, processes."""

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

SETTINGS = "settings.json"  # in a folder that is filled shard by shard

Result = TypeVar("Result")


def is_finished(out: Path, meta: dict[str, Any]) -> bool:
    """Whether ``out`` already contains the data set that ``meta`` describes; False if it is absent or empty.

    Raises ValueError if it contains anything else, because nothing is overwritten.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    index = out / "index.json"
    found = json.loads(index.read_text(encoding="utf-8"))["meta"] if index.is_file() else None
    if found == json.loads(json.dumps(meta)):
        return True
    what = f"a data set with other settings: {found}" if found else "other files"
    raise ValueError(f"--out {out}: it contains {what}; delete it or choose a different folder")


@contextmanager
def finished_or_absent(out: Path) -> Iterator[Path]:
    """Yield a folder to write to, which becomes ``out`` if the block ends without an error.

    It is named ``<out>.partial``; remains of an interrupted run are deleted first. Raises ValueError if another process
    is writing to it.
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
    """Reserve the shards with these numbers, in a claimed folder, for this process.

    Raises ValueError if another process is making one of them. Several processes may share a folder.
    """
    with (out / SETTINGS).open("r+") as file:
        if not all(_lock(file, number) for number in shards):
            raise _in_use(out)
        yield


def _lock(file: IO[str], byte: int = 0) -> bool:
    """Lock a byte of a file until the file is closed; False if another process has locked it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # some file systems do not support locks
    return True


def _in_use(out: Path) -> ValueError:
    return ValueError(
        f"--out {out}: another process is making the same shards; wait until it ends or stop it, or share the work with"
        " --part"
    )


def claim(out: Path, meta: dict[str, Any], contents: Collection[str] = ()) -> None:
    """Record in ``out``, a folder that is filled shard by shard, what it will contain.

    contents: keys of the meta data that describe the source's content and not the settings; their values may change.
    Raises ValueError if the folder has a different content, so that nothing is overwritten and restarts and parts
    agree.
    """
    file, wanted = out / SETTINGS, json.loads(json.dumps(meta))
    if file.exists():
        found = settings_of(out)
        names = {*found, *wanted} - set(contents)
        differ = sorted(name for name in names if found.get(name) != wanted.get(name))
        if differ:
            raise ValueError(
                f"--out {out}: it was made with a different {', '.join(differ)}; choose a different folder"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out}: it contains other files; choose a different folder")
    out.mkdir(parents=True, exist_ok=True)
    part = out / f".settings.{os.getpid()}.part"
    part.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def settings_of(out: Path) -> dict[str, Any]:
    """The recorded settings of a folder that is filled shard by shard; empty for a new folder."""
    try:
        return dict(json.loads((out / SETTINGS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}


def remove_leftovers(out: Path, shards: Collection[str]) -> None:
    """Delete temporary files of these shards that killed processes left in ``out``."""
    for entry in os.scandir(out):
        if entry.name.endswith(".part") and entry.name[1:].partition(".tar.")[0] + ".tar" in shards:
            Path(entry.path).unlink(missing_ok=True)


def alone(index: DatasetIndex, shard: int) -> DatasetIndex:
    """The index of a data set reduced to this shard, for the process that reads it."""
    one = slice(shard, shard + 1)
    return type(index)(index.root, index.kind, index.names[one], index.samples[one], index.bytes[one], index.meta)


def in_parallel(work: Callable[..., Result], jobs: Iterable[tuple[Any, ...]], workers: int) -> Iterator[Result]:
    """Yield the results of ``work(*job)`` as they finish, computed by ``workers`` processes.

    Jobs are taken from the iterable when a process is free. With one worker this process does the work. After an error
    the running jobs are finished, then it is raised. Raises ValueError if a process dies.
    """
    if workers == 1:
        yield from (work(*job) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # forked processes can hang, because libraries run threads
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
    """Keep libraries from starting threads, because the processes share the cores."""
    import torch

    torch.set_num_threads(1)
