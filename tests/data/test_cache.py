"""Data sets at URLs, from a real web server that also dies, cuts files short and hides them."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import pytest
from test_loader import make_sample, tokenize

from dico_t2i.config import CacheConfig, DataConfig
from dico_t2i.data.batches import Wanted
from dico_t2i.data.cache import cached_index
from dico_t2i.data.errors import DataError, SampleError
from dico_t2i.data.loader import Share, make_loader
from dico_t2i.data.reader import ShardReader
from dico_t2i.data.sources import load_data, make_order
from dico_t2i.data.writer import ShardWriter

SAMPLES, SHARD = 80, 10


class Server(ThreadingHTTPServer):
    """Serves a folder. cut: names whose next bodies end early; truthful: whether the length sent is the shorter one."""

    daemon_threads = True

    def __init__(self, folder):
        self.cut, self.truthful, self.requests = {}, False, []
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.requests.append(name)
        if self.server.cut.get(name, 0) < 1:
            return super().do_GET()
        self.server.cut[name] -= 1
        content = Path(self.translate_path(self.path)).read_bytes()
        part = content[: len(content) // 2]
        self.send_response(200)
        self.send_header("Content-Length", str(len(part if self.server.truthful else content)))
        self.end_headers()
        self.wfile.write(part)
        self.close_connection = True
        return None


@pytest.fixture
def folder(tmp_path):
    with ShardWriter(tmp_path / "set", samples_per_shard=SHARD) as writer:
        for number in range(SAMPLES):
            writer.write(make_sample(number))
    return tmp_path / "set"


@pytest.fixture
def server(folder):
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def open_cached(server, tmp_path, gigabytes=1.0, **options):
    return cached_index(server.url, CacheConfig(path=str(tmp_path / "cache"), max_gb=gigabytes), **options)


def batches(path, cache=None, workers=0, count=20, **options):
    config = DataConfig(
        path=str(path),
        cache=cache,
        image_size=8,
        streams=4,
        shuffle_block=5,
        workers=workers,
        retry_wait_s=0.01,
        **options,
    )
    index = load_data(config)
    found = make_loader(
        config,
        index,
        make_order(config, index, 3, 8),
        Share(8, 4),
        Wanted("text", tokenize=tokenize),
        seed=3,
    )
    return [(b.keys, b.captions, b.images.tolist(), b.bad) for b in islice(found, count)]


def cached_bytes(tmp_path):
    return sum(file.stat().st_size for file in (tmp_path / "cache").glob("*/*.tar*"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("scheme", ["http", "file", "folder", "cached folder"])
def test_a_url_gives_the_batches_of_the_folder(folder, server, tmp_path, scheme, workers):
    expected = batches(folder)
    cache = {"path": str(tmp_path / "cache"), "max_gb": 1}
    path = {"http": server.url, "file": folder.as_uri()}.get(scheme, folder)
    found = batches(path, cache if scheme in ("http", "cached folder") else None, workers)
    assert found == expected
    assert not any(bad for *_, bad in found)
    if scheme == "http":
        tars = [name for name in server.requests if name.endswith(".tar")]
        assert sorted(tars) == [f"shard-{n:06d}.tar" for n in range(SAMPLES // SHARD)]  # each once, for all workers


def test_a_second_run_downloads_nothing_but_the_index(server, tmp_path):
    cache = {"path": str(tmp_path / "cache"), "max_gb": 1}
    first = batches(server.url, cache)
    server.requests.clear()
    assert batches(server.url, cache) == first
    assert set(server.requests) == {"index.json", "quarantine.jsonl"}


def read_all(index, shard):
    reader = ShardReader(index, retries=3, retry_wait_s=0.01)
    return [reader.read(shard, member)["__key__"] for member in range(SHARD)]


def test_processes_share_one_download(server, tmp_path):
    index = open_cached(server, tmp_path)
    context = get_context("fork")
    workers = [context.Process(target=read_all, args=(index, 3)) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert server.requests.count("shard-000003.tar") == 1


def test_the_cache_stays_within_its_bound_and_drops_the_oldest(folder, server, tmp_path):
    each = folder.joinpath("shard-000000.tar").stat().st_size + folder.joinpath("shard-000000.tar.index").stat().st_size
    index = open_cached(server, tmp_path, 3.5 * each / 1e9)
    for shard in (0, 1, 2, 0, 3):
        read_all(index, shard)
        time.sleep(0.02)
        assert cached_bytes(tmp_path) <= 3.5 * each
    assert sorted(path.name for path in index.root.glob("*.tar")) == [f"shard-{n:06d}.tar" for n in (0, 2, 3)]
    assert not list(index.root.glob("shard-000001.tar.index"))


def test_a_shard_deleted_from_the_cache_goes_on_being_read_where_it_is_open(server, tmp_path):
    index = open_cached(server, tmp_path)
    reader = ShardReader(index)
    first = reader.read(2, 0)
    shutil.rmtree(index.root)
    assert reader.read(2, 1)["__key__"] == f"{2 * SHARD + 1:04d}"
    assert first["__key__"] == f"{2 * SHARD:04d}"
    assert read_all(index, 2)  # downloaded anew


@pytest.mark.parametrize("truthful", [False, True])
@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.tar.index"])
def test_downloads_cut_short_are_tried_again(server, tmp_path, truthful, name):
    index = open_cached(server, tmp_path)
    server.cut, server.truthful = {name: 2}, truthful
    assert len(read_all(index, 1)) == SHARD
    assert server.requests.count(name) == 3
    assert not list(index.root.glob(".*.part"))


def test_a_shard_that_never_comes_whole_is_lost_and_replaced(server, tmp_path):
    server.cut, server.truthful = {"shard-000001.tar": 10**6}, True
    found = batches(server.url, {"path": str(tmp_path / "cache"), "max_gb": 1}, retries=1)
    bad = [entry for *_, entries in found for entry in entries]
    assert {entry.shard for entry in bad} == {"shard-000001.tar"}
    assert all("but the index has" in entry.reason or "cannot be read" in entry.reason for entry in bad)
    assert not {int(key) // SHARD for keys, *_ in found for key in keys} & {1}


def test_a_server_that_dies_half_way_loses_what_was_not_there_yet(server, tmp_path):
    index = open_cached(server, tmp_path)
    assert len(read_all(index, 0)) == SHARD
    server.shutdown()
    server.server_close()
    assert len(read_all(index, 0)) == SHARD
    with pytest.raises(SampleError, match="cannot be read"):
        read_all(index, 5)


def test_a_download_that_was_killed_leaves_nothing_behind(server, tmp_path):
    index = open_cached(server, tmp_path)
    left = index.root / ".shard-000002.tar.0123.part"
    left.write_bytes(b"half")
    assert len(read_all(index, 2)) == SHARD
    assert not left.exists()


def test_a_changed_index_does_not_meet_old_shards(folder, server, tmp_path):
    before = open_cached(server, tmp_path)
    read_all(before, 0)
    shutil.rmtree(folder)
    with ShardWriter(folder, samples_per_shard=SHARD) as writer:
        for number in range(100, 100 + SHARD):
            writer.write(make_sample(number))
    assert read_all(open_cached(server, tmp_path), 0)[0] == "0100"


def test_the_quarantine_list_comes_along(folder, server, tmp_path):
    folder.joinpath("quarantine.jsonl").write_text('{"shard": "shard-000001.tar", "key": null, "reason": "cut"}\n')
    assert open_cached(server, tmp_path).quarantine == {1: None}
    folder.joinpath("quarantine.jsonl").unlink()
    assert open_cached(server, tmp_path).quarantine == {}


def test_what_cannot_be_used_is_told(folder, server, tmp_path):
    with pytest.raises(DataError, match=r"max_gb: 1e-07 is less than the largest shard"):
        open_cached(server, tmp_path, 1e-7)
    folder.joinpath("index.json").unlink()
    with pytest.raises(DataError, match=r"there is no index\.json.*python -m dico_t2i\.data DIR"):
        open_cached(server, tmp_path)
    config = CacheConfig(path=str(tmp_path), max_gb=1)
    with pytest.raises(DataError, match=r"s3:// needs a further package: pip install dico_t2i\[s3\]"):
        cached_index("s3://bucket/set", config)
    with pytest.raises(DataError, match="Protocol not known: nonsense"):
        cached_index("nonsense://set", config)
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match=r"index\.json: cannot be read"):
        open_cached(server, tmp_path, retries=1, retry_wait_s=0.01)


def test_threads_of_one_process_do_not_get_in_each_others_way(server, tmp_path):
    index = open_cached(server, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        assert all(len(keys) == SHARD for keys in pool.map(partial(read_all, index), [0, 0, 1, 1, 2, 2, 3, 3]))
    assert sorted(path.name[6:12] for path in index.root.glob("*.tar")) == ["000000", "000001", "000002", "000003"]
