"""What the data preparation scripts share: folders that are finished or absent, parts, processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # it imports torch, which the scripts of cluster/ do not need
    from dico_t2i.data.index import DatasetIndex

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

    It is ``<out>.partial``; what an interrupted run left there is removed first.
    """
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(out)


def claim(out: Path, meta: dict[str, Any]) -> None:
    """Note in ``out``, a folder filled shard by shard, what it will hold.

    Raises ValueError if it holds something else already: nothing is overwritten, and restarts and parts agree.
    """
    file = out / "settings.json"
    if file.exists():
        found, wanted = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(meta))
        differ = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        if differ:
            raise ValueError(f"--out {out}: made with another {', '.join(differ)}; choose another folder")
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out}: holds other files; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    part = out / f".settings.{os.getpid()}.part"
    part.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


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
