"""Tars at URLs: servers without range requests, statuses, signatures, downloads that are cut."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep import webdataset_shards
from dico_t2i import remote
from tests.data_prep.test_counts import pairs, report, write_tar
from tests.shards import read_samples


class Server:
    """Tars over HTTP; by name statuses to answer with, and how often."""

    def __init__(self, root: Path) -> None:
        self.statuses: dict[str, list[int]] = {}
        self.asked: list[str] = []
        self.etags: dict[str, str] = {}
        self.heads = True
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_HEAD(self) -> None:
                if outer.heads:
                    super().do_HEAD()
                else:
                    self.send_error(405)

            def do_GET(self) -> None:
                """All of the file, whatever range was asked for."""
                name = self.path.partition("?")[0].strip("/")
                outer.asked.append(self.path)
                if outer.statuses.get(name):
                    self.send_error(outer.statuses[name].pop(0))
                elif "Signature=old" in self.path:
                    self.send_error(403)
                else:
                    super().do_GET()

            def end_headers(self) -> None:
                name = self.path.partition("?")[0].strip("/")
                if name in outer.etags:
                    self.send_header("ETag", outer.etags[name])
                super().end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(root)))
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(webdataset_shards, "FIRST_WAIT_S", 0.01)
    (tmp_path / "tars").mkdir()
    for shard in range(3):
        write_tar(tmp_path / "tars" / f"{shard}.tar", pairs(f"{shard}0", f"{shard}1"))
    server = Server(tmp_path / "tars")
    yield server
    server.http.shutdown()


def prepare(url: str, out: Path, *options: str) -> int:
    return webdataset_shards.main(["--shards", url, "--out", str(out), "--workers", "1", *options])


@pytest.mark.parametrize("heads", [True, False])
def test_a_server_without_ranges_is_read(server: Server, tmp_path: Path, heads: bool) -> None:
    server.heads = heads
    assert prepare(server.url + "/{0..2}.tar", tmp_path / "out") == 0
    assert len(read_samples(tmp_path / "out")) == 6


@pytest.mark.parametrize(("status", "requests"), [(403, 1), (401, 1), (500, 4), (503, 4), (429, 4)])
def test_what_may_come_back_is_told_with_its_status(
    server: Server, tmp_path: Path, status: int, requests: int, capsys: pytest.CaptureFixture[str]
) -> None:
    server.heads = False
    server.statuses["1.tar"] = [status] * 20
    assert prepare(server.url + "/{0..2}.tar", tmp_path / "out") == 1
    assert f"/1.tar: HTTP {status}" in capsys.readouterr().out
    assert server.asked.count("/1.tar") <= requests + 1  # the first may have asked for the size
    server.statuses.clear()
    assert prepare(server.url + "/{0..2}.tar", tmp_path / "out") == 0
    assert len(read_samples(tmp_path / "out")) == 6


@pytest.mark.parametrize("status", [404, 410])
def test_what_is_gone_is_counted(server: Server, tmp_path: Path, status: int) -> None:
    server.statuses["1.tar"] = [status] * 20
    assert prepare(server.url + "/{0..2}.tar", tmp_path / "out") == 0
    assert report(tmp_path / "out")["left out"] == {"missing archives": 1}


def test_a_failure_that_passes_is_tried_again(server: Server, tmp_path: Path) -> None:
    server.statuses["0.tar"] = [500, 503]
    assert prepare(server.url + "/0.tar", tmp_path / "out") == 0


def test_a_renewed_signature_is_the_same_source(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def urls(signature: str) -> list[str]:
        return [f"{server.url}/{shard}.tar?Signature={signature}" for shard in range(3)]

    common = ["--out", str(tmp_path / "out"), "--workers", "1"]
    assert webdataset_shards.main(["--shards", *urls("a"), *common, "--part", "0/2"]) == 0
    assert webdataset_shards.main(["--shards", *urls("old"), *common, "--part", "1/2"]) == 1
    printed = capsys.readouterr().out
    assert "1.tar: HTTP 403 Forbidden (a signature that has expired, or no permission?)" in printed
    assert "Signature=" not in printed
    assert webdataset_shards.main(["--shards", *urls("b"), *common, "--part", "1/2"]) == 0
    assert webdataset_shards.main(["--shards", *urls("c"), *common]) == 0
    assert "already contains" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["size", "etag"])
def test_a_tar_that_was_replaced_is_seen(server: Server, tmp_path: Path, way: str) -> None:
    server.etags["1.tar"] = '"one"'
    assert prepare(server.url + "/{0..2}.tar", tmp_path / "out") == 0
    members = pairs("10", "11") if way == "etag" else pairs("10", "11", "12", "13", "14", "15")
    write_tar(tmp_path / "tars" / "1.tar", [*members[:-1], (members[-1][0], b"a cat")])
    if way == "etag":
        server.etags["1.tar"] = '"two"'
    with pytest.raises(ValueError, match=r"the source has changed since 1 shards were made, such as shard-000001.tar"):
        prepare(server.url + "/{0..2}.tar", tmp_path / "out")
    assert prepare(server.url + "/{0..2}.tar", tmp_path / "out", "--redo-changed") == 0


def test_another_etag_of_the_same_content_is_no_change(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.etags["1.tar"] = '"one"'
    assert prepare(server.url + "/{0..2}.tar", tmp_path / "out") == 0
    server.etags["1.tar"] = '"two"'
    assert prepare(server.url + "/{0..2}.tar", tmp_path / "out") == 0
    assert "already contains" in capsys.readouterr().out


def test_patience_ends_and_refusals_are_final(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    errors: list[OSError] = [OSError("a"), OSError("b"), remote.RefusedError("c"), OSError("d")]

    def work() -> None:
        raise errors.pop(0)

    with pytest.raises(remote.RefusedError, match="c"):
        remote.patiently(work, 5, 0.5)
    assert waits == [0.5, 1.0]
