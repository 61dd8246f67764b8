"""Shards of img2dataset's layout: what is taken, URLs, damage, and that they train as they are."""

import functools
import http.server
import io
import json
import pickle
import tarfile
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep import webdataset_shards
from dico_t2i.config import DataConfig
from dico_t2i.data.batches import Wanted
from dico_t2i.data.index import load_index
from dico_t2i.data.loader import Share, make_loader
from dico_t2i.data.order import Order
from tests.shards import image_bytes, read_samples, tar_bytes

SHARDS, EACH = 3, 8


def about(number: int) -> dict[str, Any]:
    """The json that img2dataset writes."""
    return {
        "key": f"{number:09d}",
        "caption": f"picture {number}",
        "url": f"https://example.org/{number}.jpg",
        "status": "success",
        "error_message": None,
        "width": 60,
        "height": 40,
        "original_width": 120,
        "original_height": 80,
        "aesthetic": number / 2,
        "NSFW": "UNSURE" if number == 7 else "UNLIKELY",
        "blip_caption": [f"a machine's words on {number}"],
    }


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def members(number: int) -> list[tuple[str, bytes]]:
    key, given = f"{number:09d}", about(number)
    files = {"jpg": image_bytes(number), "json": json.dumps(given).encode(), "txt": given["caption"].encode()}
    return [(f"{key}.{extension}", data) for extension, data in files.items()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """24 pairs as img2dataset leaves them, with its other files."""
    folder = tmp_path / "source"
    folder.mkdir()
    for shard in range(SHARDS):
        numbers = range(shard * EACH, shard * EACH + EACH)
        write_tar(folder / f"{shard:05d}.tar", [member for number in numbers for member in members(number)])
        (folder / f"{shard:05d}_stats.json").write_text("{}")
        (folder / f"{shard:05d}.parquet").write_bytes(b"")
    return folder


def prepare(place: str | Path, out: Path, *options: str) -> int:
    return webdataset_shards.main(["--shards", str(place), "--out", str(out), "--workers", "1", *options])


def left_out(out: Path) -> dict[str, int]:
    content: dict[str, int] = json.loads((out / "report.json").read_text())["left out"]
    return content


def test_img2dataset_shards(source: Path, tmp_path: Path) -> None:
    assert prepare(source, tmp_path / "out") == 0
    samples = read_samples(tmp_path / "out")
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(SHARDS * EACH)]
    assert samples[5]["jpg"] == image_bytes(5)  # as it is
    found = json.loads(samples[5]["json"])
    assert (found["captions"], found["aesthetic"], found["original_width"]) == (["picture 5"], 2.5, 120)
    assert load_index(tmp_path / "out").samples.tolist() == [EACH] * SHARDS


def test_fields_and_filters(source: Path, tmp_path: Path) -> None:
    options = ["--caption-fields", "txt", "blip_caption", "--min-field", "aesthetic=3", "--drop-value", "NSFW=UNSURE"]
    assert prepare(source / "*0.tar", tmp_path / "out", *options, "--crop", "center", "--size", "16") == 0
    (sample,) = read_samples(tmp_path / "out")
    found = json.loads(sample["json"])
    assert found["captions"] == ["picture 6", "a machine's words on 6"]
    assert "blip_caption" not in found
    assert left_out(tmp_path / "out") == {"aesthetic below 3": 6, "NSFW is UNSURE": 1}


def batches(folder: Path) -> list[tuple[list[str], list[str] | None, torch.Tensor | None]]:
    index = load_index(folder)
    data = DataConfig(path=str(folder), image_size=16, streams=4, shuffle_block=4, workers=0)
    order = Order(3, index.samples, data.streams, data.shuffle_block)
    loader = make_loader(data, index, order, Share(8, 8), Wanted("text"), seed=3)
    return [(batch.keys, batch.captions, batch.images) for batch in islice(loader, 6)]


def test_img2dataset_and_own_layout_train_to_the_same_batches(source: Path, tmp_path: Path) -> None:
    assert prepare(source, tmp_path / "out") == 0
    direct, imported = batches(source), batches(tmp_path / "out")
    for (keys, captions, images), (own_keys, own_captions, own_images) in zip(direct, imported, strict=True):
        assert (keys, captions) == (own_keys, own_captions)
        assert images is not None
        assert own_images is not None
        assert torch.equal(images, own_images)


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("raise SystemExit('a pickle was loaded')",))


def test_hostile_archives(tmp_path: Path) -> None:
    good, bomb = image_bytes(1), pickle.dumps(Bomb())
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in [
            ("a.jpg", good), ("a.pyd", bomb), ("a.pkl", bomb), ("a.txt", b"a dog"),
            ("b.pyd", bomb), ("b.txt", b"no image"),
            ("../c.jpg", good), ("../c.txt", b"outside"),
            ("/d.jpg", good), ("/d.txt", b"absolute"),
            ("e.jpg", good), ("e.json", b"[" * 100_000),
            ("f.jpg", good), ("f.json", b"[]"),
            ("g.jpg", good), ("g.txt", b"a dog"), ("g.cls", b"1e"),
            ("h.jpg", good), ("h.txt", "Füße".encode("cp1252")),
            ("i.jpg", good), ("i.json", json.dumps({"captions": ["a \ud800 cat"], "n": "\udcff"}).encode()),
            ("j.jpg", good), ("j.json", json.dumps({"captions": {"a": 1}}).encode()),
        ]:  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for kind, name in ((tarfile.SYMTYPE, "k.jpg"), (tarfile.LNKTYPE, "l.jpg"), (tarfile.CHRTYPE, "m.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert prepare(tmp_path / "0.tar", tmp_path / "out") == 0
    found = {s["__key__"]: json.loads(s["json"])["captions"] for s in read_samples(tmp_path / "out")}
    assert found == {"a": ["a dog"], "h": ["Füße"], "i": ["a cat"]}
    assert left_out(tmp_path / "out") == {
        "samples without an image": 1,
        "unreadable json or cls members": 3,
        "images without captions": 1,
        "absolute names (tar them without --absolute-names)": 1,
        "names with .. in them": 1,
        "symbolic links (tar them with --dereference)": 1,
        "hard links (tar them with --hard-dereference)": 1,
        "devices and pipes": 1,
    }


def test_a_cut_archive_gives_what_is_before_the_cut(source: Path, tmp_path: Path) -> None:
    cut = source / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:8000])
    (source / "00002.tar").write_bytes(b"")
    assert prepare(source, tmp_path / "out") == 0
    index = load_index(tmp_path / "out")
    assert index.samples[0] == EACH
    assert 0 < index.samples[1] < EACH
    assert index.samples[2] == 0
    assert left_out(tmp_path / "out")["damaged stretches of archives"] == 2


@pytest.fixture
def server(source: Path) -> Iterator[tuple[str, set[str]]]:
    """The source over HTTP: its URL, and names that are refused for now."""
    broken: set[str] = set()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.strip("/") in broken:
                self.send_error(503)
            else:
                super().do_GET()

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(source))) as http_:
        threading.Thread(target=http_.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_.server_address[1]}", broken
        http_.shutdown()


def test_urls_and_a_network_that_breaks(
    source: Path, server: tuple[str, set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, broken = server
    out = tmp_path / "out"
    assert prepare(source, tmp_path / "local") == 0
    monkeypatch.setattr(webdataset_shards, "FIRST_WAIT_S", 0.01)
    broken.add("00001.tar")
    assert prepare(url + "/{00000..00002}.tar", out) == 1
    assert sorted(tar_bytes(out)) == ["shard-000000.tar", "shard-000002.tar"]  # what is finished stays
    assert not (out / "index.json").exists()
    broken.clear()
    assert prepare(url + "/{00000..00002}.tar", out) == 0
    assert tar_bytes(out) == tar_bytes(tmp_path / "local")
    assert not list(out.glob(".*"))


def test_an_archive_that_is_gone_is_counted(server: tuple[str, set[str]], tmp_path: Path) -> None:
    assert prepare(server[0] + "/{00002..00003}.tar", tmp_path / "out") == 0
    assert left_out(tmp_path / "out") == {"missing archives": 1}
    assert len(load_index(tmp_path / "out")) == EACH


def test_no_shards_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no tars"):
        prepare(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="there are no tars"):
        prepare(tmp_path / "absent.tar", tmp_path / "out")
