"""Shards that vanish, break or cannot be read for a while, and workers that die or stall, in mid-run."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import pytest
from test_loader import make_sample, tokenize
from torch.utils.data import get_worker_info

from dico_t2i.config import DataConfig
from dico_t2i.data import reader
from dico_t2i.data.batches import Wanted
from dico_t2i.data.errors import DataError, SampleError
from dico_t2i.data.index import load_index
from dico_t2i.data.loader import Share, make_loader
from dico_t2i.data.order import Order
from dico_t2i.data.reader import ShardReader
from dico_t2i.data.writer import ShardWriter
from tests import forkserver

SAMPLES, SHARD, STREAMS, BATCH = 240, 60, 4, 8  # each stream lies in one shard


@pytest.fixture
def index(tmp_path):
    with ShardWriter(tmp_path / "set", samples_per_shard=SHARD) as writer:
        for number in range(SAMPLES):
            writer.write(make_sample(number))
    return load_index(tmp_path / "set")


def loader(index, *, workers=0, micro_batch=4, start_step=0, timeout_s=0.0, retries=0, **options):
    sizes = {"image_size": 8, "streams": STREAMS, "shuffle_block": 32}
    config = DataConfig(path=str(index.root), workers=workers, retries=retries, **sizes, **options)
    order = Order(3, index.samples, config.streams, config.shuffle_block)
    wanted = Wanted("text", tokenize=tokenize)
    return make_loader(
        config,
        index,
        order,
        Share(BATCH, micro_batch),
        wanted,
        seed=3,
        start_step=start_step,
        timeout_s=timeout_s,
    )


def content(batch):
    return batch.positions.tolist(), batch.keys, batch.captions, batch.images.tolist()


def shard_of(key):
    return int(key) // SHARD


class Faulty:
    """os.pread, failing so many times."""

    def __init__(self, failures):
        self.failures, self.calls, self.pread = failures, 0, os.pread

    def __call__(self, *arguments):
        self.calls += 1
        if self.failures > 0:
            self.failures -= 1
            raise OSError(errno.EIO, "Input/output error")
        return self.pread(*arguments)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_that_pass_change_nothing(index, monkeypatch, workers):
    expected = [content(batch) for batch in islice(loader(index), 40)]
    monkeypatch.setattr(os, "pread", Faulty(3))
    found = list(islice(loader(index, workers=workers, retries=3, retry_wait_s=0.001), 40))
    assert [content(batch) for batch in found] == expected
    assert not any(batch.bad for batch in found)


def test_a_folder_that_is_away_for_a_while_changes_nothing(index):
    expected = [content(batch) for batch in islice(loader(index), 40)]
    away = index.root.with_name("away")
    batches = iter(loader(index, retries=12, retry_wait_s=0.01))
    index.root.rename(away)  # nothing is open yet
    back = threading.Timer(0.3, away.rename, (index.root,))
    back.start()
    found = list(islice(batches, 40))
    back.join()
    assert [content(batch) for batch in found] == expected
    assert not any(batch.bad for batch in found)


def test_waits_double_and_the_shard_is_opened_anew(index, monkeypatch):
    waits, faulty = [], Faulty(4)
    monkeypatch.setattr(reader.time, "sleep", waits.append)
    monkeypatch.setattr(os, "pread", faulty)
    shards = ShardReader(index, retries=4, retry_wait_s=0.5)
    opened = []
    monkeypatch.setattr(type(index), "path", lambda self, shard: opened.append(shard) or self.root / self.names[shard])
    assert shards.read(1, 0)["__key__"] == f"{SHARD:04d}"
    assert waits == [0.5, 1.0, 2.0, 4.0]
    assert opened == [1, 1] * 5  # the index and the shard


def test_a_lost_shard_costs_its_retries_once_and_is_looked_for_again(index, monkeypatch):
    waits, now = [], [100.0]
    monkeypatch.setattr(reader.time, "sleep", waits.append)
    monkeypatch.setattr(reader.time, "monotonic", lambda: now[0])
    away = index.path(2).with_name("away")
    index.path(2).rename(away)
    shards = ShardReader(index, retries=5, retry_wait_s=0.5)
    for member in range(SHARD):
        with pytest.raises(SampleError, match="No such file"):
            shards.read(2, member)
    assert waits == [0.5, 1, 2, 4, 8]
    assert shards.is_lost(2)
    assert not shards.is_lost(1)
    now[0] += reader.LOOK_AGAIN_S + 1
    with pytest.raises(SampleError, match="No such file"):
        shards.read(2, 0)
    assert len(waits) == 5
    away.rename(index.path(2))
    with pytest.raises(SampleError):  # not yet: it was looked for just now
        shards.read(2, 0)
    now[0] += reader.LOOK_AGAIN_S + 1
    assert shards.read(2, 0)["__key__"] == f"{2 * SHARD:04d}"
    assert not shards.is_lost(2)


def delete(path):
    path.unlink()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path):
    garbage = path.with_name("garbage")
    garbage.write_bytes(os.urandom(path.stat().st_size))
    garbage.replace(path)


def overwrite_in_place(path):
    with path.open("r+b") as file:
        file.write(os.urandom(path.stat().st_size))


def vanish(path):
    path.with_name(path.name + ".index").unlink()
    path.unlink()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [delete, truncate, overwrite, overwrite_in_place, vanish])
def test_a_shard_damaged_in_mid_run_is_replaced_and_counted(index, damage, workers):
    steps = 2 * SAMPLES // BATCH
    expected = [content(batch) for batch in islice(loader(index), 2 * steps)]
    batches = iter(loader(index, workers=workers, retries=2, retry_wait_s=0.001))
    found = [next(batches) for _ in range(6)]
    damage(index.path(1))
    found += [next(batches) for _ in range(2 * steps - 6)]
    bad = [entry for batch in found for entry in batch.bad]
    assert {entry.shard for entry in bad} <= {index.names[1]}
    replaced = {entry.position for entry in bad}
    # A shard that was open goes on being read where only its name was taken away or given to another file.
    assert damage not in (truncate, overwrite_in_place) or len(replaced) > SHARD // 2, len(replaced)
    for batch, (positions, keys, captions, _) in zip(found, expected, strict=True):
        for i, position in enumerate(positions):
            if position in replaced:
                assert shard_of(keys[i]) == 1  # what should have come
            else:
                assert (batch.positions[i], batch.keys[i], batch.captions[i]) == (position, keys[i], captions[i])


def test_a_lost_shard_larger_than_the_neighbourhood_lists_each_sample_once(index):
    """All the neighbours in its stream are lost as well, so the replacements come from other shards."""
    index.path(1).unlink()
    epoch = list(islice(loader(index, retries=1, retry_wait_s=0.001), SAMPLES // 4))
    bad = [entry for batch in epoch for entry in batch.bad]
    assert len(bad) == len({entry.position for entry in bad}) == SHARD
    assert {shard_of(key) for batch in epoch for key in batch.keys} == {0, 2, 3}
    again = list(islice(loader(index, workers=2), SAMPLES // 4))
    assert [content(batch) for batch in again] == [content(batch) for batch in epoch]


def test_a_shard_that_was_repaired_is_read_again(index):
    whole = index.path(1).read_bytes()
    shards = ShardReader(index)
    overwrite(index.path(1))
    for member in range(3):
        with pytest.raises(SampleError, match="checksum"):
            shards.read(1, member)
    repaired = index.path(1).with_name("repaired")
    repaired.write_bytes(whole)
    repaired.replace(index.path(1))
    assert shards.read(1, 5)["__key__"] == f"{SHARD + 5:04d}"


def test_without_any_data_the_run_stops_with_a_message(index):
    shutil.rmtree(index.root)
    with pytest.raises(DataError, match=r"shard-00000\d\.tar: more than 100 bad samples in a row, .*cannot be read"):
        next(iter(loader(index, retries=1, retry_wait_s=0.001)))


def worker_pids(batches):
    return [worker.pid for worker in batches.batches._workers]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_was_killed_is_named(index, number):
    batches = iter(loader(index, workers=2, start_step=5, timeout_s=30))
    first = [next(batches) for _ in range(4)]
    assert len(first) == 4
    victim = worker_pids(batches)[1]
    os.kill(victim, number)
    time.sleep(0.2)  # torch would raise RuntimeError here, wherever the main thread is
    pattern = rf"data worker 1 \(pid {victim}\) of rank 0 was killed by {number.name}.*; step (\d+) waits for (.*) in "
    with pytest.raises(DataError, match=pattern) as caught:
        list(islice(batches, 20))
    step, shards = re.search(pattern, str(caught.value)).groups()
    assert 5 + 4 // 2 <= int(step) <= 5 + 2 * 6
    assert set(shards.split(", ")) <= set(index.names)


def test_a_worker_that_stalls_is_named_with_what_it_owes(index, monkeypatch):
    pread = os.pread

    def hang_in_worker_1(*args):
        worker = get_worker_info()
        if worker and worker.id == 1:
            time.sleep(60)
        return pread(*args)

    monkeypatch.setattr(reader.os, "pread", hang_in_worker_1)
    batches = iter(loader(index, workers=2, start_step=5, timeout_s=1.5))
    pids = worker_pids(batches)
    next(batches)
    taken = [1]
    pattern = rf"data worker 1 \(pid {pids[1]}\) of rank 0 gave no data for 2 s; step (\d+) waits for (.*) in "
    with pytest.raises(DataError, match=pattern) as caught:
        taken.extend(1 for _ in batches)
    step, shards = re.search(pattern, str(caught.value)).groups()
    taken = sum(taken)
    assert int(step) == 5 + taken // 2
    owed = next(islice(loader(index, start_step=5), taken, None))
    assert set(shards.split(", ")) == {index.names[shard_of(key)] for key in owed.keys}


ORPHANS = """
import sys, time
sys.path[:0] = sys.argv[2:]
from test_faults import loader
from dico_t2i.data.index import load_index

batches = iter(loader(load_index(sys.argv[1]), workers=1))
next(batches)
print(batches.batches._workers[0].pid, flush=True)
time.sleep(60)
"""


def test_a_worker_does_not_outlive_a_parent_that_is_killed(index):
    command = [sys.executable, "-c", ORPHANS, str(index.root), str(Path(__file__).parent), *sys.path]
    parent = forkserver.Popen(command, stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 120
    while Path(f"/proc/{worker}/stat").exists() and state(worker) != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def state(process):
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
