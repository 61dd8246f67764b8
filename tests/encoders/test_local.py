"""Where weights come from: the order of places, the error for a missing model, and that the network stays out."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from dico_t2i.config import AutoencoderConfig, TextEncoderConfig, TextTowerConfig
from dico_t2i.encoders import MissingModelError, load_autoencoder, load_text_encoder
from dico_t2i.encoders.local import config_hash, read_json, reading, resolve
from dico_t2i.encoders.text import find_tower, pretrained_source
from tests.small_models import save_autoencoder

FILES = [("config.json",), ("model.safetensors", "pytorch_model.bin")]
NAME = "nobody/no-such-model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, in an empty working folder."""
    from huggingface_hub import constants

    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.delenv("DICO_ALLOW_DOWNLOAD", raising=False)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every attempt to look up or reach a host; the attempt fails."""
    attempts: list[object] = []

    def refuse(*args: object, **kwargs: object) -> None:
        attempts.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return attempts


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


def fill_cache(cache: Path, *names: str) -> Path:
    """Files as huggingface_hub lays them out: a reference names the commit, the commit is a folder."""
    model = cache / "models--nobody--no-such-model"
    fill(model / "refs")
    (model / "refs" / "main").write_text("c0ffee")
    return fill(model / "snapshots" / "c0ffee", *names)


def test_a_local_folder_comes_before_the_cache(cache: Path, tmp_path: Path) -> None:
    snapshot = fill_cache(cache, "config.json", "model.safetensors")
    assert [path.parent for path in resolve(NAME, FILES, "key")] == [snapshot, snapshot]
    local = fill(tmp_path / NAME, "config.json", "model.safetensors")
    assert [path.resolve().parent for path in resolve(NAME, FILES, "key")] == [local, local]


def test_the_preferred_name_wins_and_the_other_will_do(cache: Path, tmp_path: Path) -> None:
    folder = fill(tmp_path / "model", "config.json", "pytorch_model.bin")
    assert resolve(str(folder), FILES, "key")[1].name == "pytorch_model.bin"
    fill(folder, "model.safetensors")
    assert resolve(str(folder), FILES, "key")[1].name == "model.safetensors"


def test_files_of_two_places_are_not_mixed(cache: Path, tmp_path: Path) -> None:
    fill(tmp_path / NAME, "config.json")
    fill_cache(cache, "model.safetensors")
    with pytest.raises(MissingModelError) as caught:
        resolve(NAME, FILES, "autoencoder.path")
    text = str(caught.value)
    assert f"{tmp_path / NAME}: lacks model.safetensors or pytorch_model.bin" in text
    assert f"{cache}/models--nobody--no-such-model: lacks config.json" in text


def test_a_missing_model_says_what_where_and_how(cache: Path, tmp_path: Path, connections: list[object]) -> None:
    with pytest.raises(MissingModelError) as caught:
        resolve(NAME, FILES, "autoencoder.path")
    text = str(caught.value)
    assert text.startswith(f"autoencoder.path: no usable copy of '{NAME}'")
    assert f"{tmp_path / NAME}: not found" in text
    assert f"{cache}/models--nobody--no-such-model: not found" in text
    assert f"hf download {NAME} config.json model.safetensors --local-dir no-such-model" in text
    assert "set autoencoder.path to that folder" in text
    assert "DICO_ALLOW_DOWNLOAD=1" in text
    assert connections == []


def test_a_missing_folder_is_not_taken_for_a_hub_id(cache: Path) -> None:
    with pytest.raises(MissingModelError) as caught:
        resolve("/models/none/vae", FILES, "autoencoder.path")
    assert "/models/none/vae: not found" in str(caught.value)
    assert "hf download" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (AutoencoderConfig(), "autoencoder.path"),
        (AutoencoderConfig(kind="tiny", path="madebyollin/taesd"), "autoencoder.path"),
        (TextEncoderConfig(), "text_encoder.model"),
        (TextEncoderConfig(kind="open_clip", model="ViT-L-14"), "text_encoder.pretrained"),
    ],
)
def test_the_loaders_report_a_missing_model_without_the_network(
    cache: Path, connections: list[object], config: AutoencoderConfig | TextEncoderConfig, key: str
) -> None:
    load: Any = load_autoencoder if isinstance(config, AutoencoderConfig) else load_text_encoder
    with pytest.raises(MissingModelError, match=key):
        load(config, "cpu")
    assert connections == []


def test_a_tag_of_open_clip_is_looked_up_by_its_hub_id(cache: Path) -> None:
    """Weights alone, as open_clip caches them, are found; the advice for a bare machine includes their config."""
    model = cache / "models--timm--vit_large_patch14_clip_224.openai"
    config = TextEncoderConfig(kind="open_clip", model="ViT-L-14")
    with pytest.raises(MissingModelError) as caught:
        load_text_encoder(config, "cpu")
    assert "open_clip_model.safetensors open_clip_config.json --local-dir" in str(caught.value)
    fill(model / "refs")
    (model / "refs" / "main").write_text("c0ffee")
    weights = fill(model / "snapshots" / "c0ffee", "open_clip_model.safetensors") / "open_clip_model.safetensors"
    with pytest.raises(ValueError, match=re.escape(f"{weights}: cannot be loaded")):
        load_text_encoder(config, "cpu")


def test_torn_files_are_named(tmp_path: Path) -> None:
    path = fill(tmp_path, "config.json") / "config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        read_json(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: must hold a JSON object"):
        read_json(path)
    with pytest.raises(ValueError, match="weights: cannot be loaded"), reading(tmp_path / "weights"):
        raise SafetensorError("incomplete metadata")


def test_the_hash_of_a_config_leaves_out_a_library_s_notes() -> None:
    plain = config_hash({"width": 4, "kind": "kl"})
    assert plain == config_hash({"kind": "kl", "width": 4, "_diffusers_version": "0.42"})
    assert plain != config_hash({"kind": "kl", "width": 8})


def run_python(code: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "DICO_ALLOW_DOWNLOAD")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


MISSING = """
import sys
from dico_t2i.config import AutoencoderConfig, TextEncoderConfig
from dico_t2i.encoders import MissingModelError, load_autoencoder, load_text_encoder
heavy = {"torchvision", "open_clip", "transformers", "diffusers"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import huggingface_hub.constants
assert huggingface_hub.constants.HF_HUB_OFFLINE
for load in (
    lambda: load_autoencoder(AutoencoderConfig(path="nobody/none"), "cpu"),
    lambda: load_text_encoder(TextEncoderConfig(model="nobody/none"), "cpu"),
    lambda: load_text_encoder(TextEncoderConfig(kind="open_clip", model="ViT-B-32"), "cpu"),
):
    try:
        load()
    except MissingModelError:
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    else:
        raise SystemExit("found a model that does not exist")
"""


def test_heavy_libraries_are_not_imported_until_a_model_is_found(tmp_path: Path) -> None:
    run_python(MISSING, HF_HUB_CACHE=str(tmp_path))


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as one download needs: a repository with config.json and pytorch_model.bin."""

    def do_HEAD(self) -> None:
        known = self.path in (f"/{NAME}/resolve/main/config.json", f"/{NAME}/resolve/main/pytorch_model.bin")
        self.send_response(200 if known else 404)
        if not known:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "c0ffee")
        self.send_header("ETag", f'"{self.path.rpartition("/")[2]}"')
        self.send_header("Content-Length", "2" if known else "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(b"{}")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


FETCH = f"""
import json
from dico_t2i.encoders.local import resolve
print(json.dumps([str(path) for path in resolve({NAME!r}, {FILES!r}, "key")]))
"""


def test_the_hub_is_asked_when_it_is_allowed(hub: str, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": hub, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    fetched = [Path(path) for path in json.loads(run_python(FETCH, DICO_ALLOW_DOWNLOAD="1", **environment))]
    assert [path.name for path in fetched] == ["config.json", "pytorch_model.bin"]
    assert fetched[1].read_text() == "{}"
    assert [Path(path) for path in json.loads(run_python(FETCH, **environment))] == fetched  # from the cache


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a web server's folder; a cache of this test's own, and no permission to use the network."""
    (tmp_path / "store").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "store"))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("dico_t2i.encoders.local.URL_CACHE", tmp_path / "cache")
    for name in ("DICO_ALLOW_DOWNLOAD", "DICO_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_autoencoder_at_a_url_is_that_of_its_folder(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Downloaded once, if that is allowed; then it comes from the cache, though the server is not asked."""
    folder = save_autoencoder(tmp_path / "store" / "models" / "vae")
    config = AutoencoderConfig(path=f"{store}/models/vae/")
    with pytest.raises(MissingModelError, match="DICO_ALLOW_DOWNLOAD=1") as caught:
        load_autoencoder(config, "cpu")
    assert "dico prefetch" in str(caught.value)
    monkeypatch.setenv("DICO_ALLOW_DOWNLOAD", "1")
    loaded = load_autoencoder(config, "cpu").identity()
    assert loaded == load_autoencoder(AutoencoderConfig(path=str(folder)), "cpu").identity()
    monkeypatch.delenv("DICO_ALLOW_DOWNLOAD")
    (folder / "config.json").unlink()
    assert load_autoencoder(config, "cpu").identity() == loaded
    cached = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sorted(cached) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_url_without_the_files_says_what_is_missing(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "store" / "half", "config.json")
    monkeypatch.setenv("DICO_ALLOW_DOWNLOAD", "1")
    with pytest.raises(MissingModelError) as caught:
        resolve(f"{store}/half", FILES, "autoencoder.path")
    assert f"{store}/half: lacks model.safetensors or pytorch_model.bin" in str(caught.value)
    with pytest.raises(MissingModelError, match="Cannot connect to host"):
        resolve("http://127.0.0.1:9/none", FILES, "autoencoder.path")


def test_a_url_may_be_a_single_file_of_open_clip(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "store" / "clips", "mine.pt")
    monkeypatch.setenv("DICO_ALLOW_DOWNLOAD", "1")
    tower = TextTowerConfig(kind="open_clip", model="ViT-B-32", pretrained=f"{store}/clips/mine.pt")
    assert {path.name for path in find_tower(tower)} == {"mine.pt"}
    assert pretrained_source(tower) == f"{store}/clips"
