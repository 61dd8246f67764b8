"""Weights in one folder: from local folders, from a hub, verified; and no network afterwards."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from dico_t2i.commands.prefetch import PrefetchError, check, prefetch
from dico_t2i.config import parse_config
from dico_t2i.encoders import MissingModelError, find_autoencoder
from dico_t2i.encoders.local import file_hash
from tests.encoders.test_local import Hub
from tests.small_models import save_autoencoder

NAME = "nobody/small-vae"
TREE = {
    "name": "small",
    "model": {"hidden_size": 8, "depths": [1, 1, 1, 1, 1], "mlp_ratio": 2},
    "data": {"path": "data", "image_size": 32, "streams": 8},
    "train": {"duration": {"steps": 1}, "global_batch": 8},
}


def config_of(path: str):
    return parse_config({**TREE, "autoencoder": {"path": path}}, "test")


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("prefetch") / "small-vae")


def test_a_local_folder_is_copied_once_and_verified(vae, tmp_path, monkeypatch):
    out, lines = tmp_path / "weights", []
    prefetch(config_of(str(vae)), out, report=lines.append)
    assert len(lines) == 2
    copied = out / "small-vae" / "config.json"
    manifest = json.loads((out / "manifest.json").read_text())["files"]
    assert manifest["small-vae/config.json"]["sha256"] == file_hash(vae / "config.json") == file_hash(copied)
    before = copied.stat().st_mtime_ns
    prefetch(config_of(str(vae)), out, report=lines.append)
    assert len(lines) == 2
    assert copied.stat().st_mtime_ns == before
    assert check(out, config_of(str(vae))) == 2
    monkeypatch.setenv("DICO_WEIGHTS", str(out))
    found = find_autoencoder(config_of("/elsewhere/small-vae").autoencoder)
    assert {path.parent for path in found} == {out / "small-vae"}


def test_damage_is_found_and_mended(vae, tmp_path):
    out, config = tmp_path / "weights", config_of(str(vae))
    prefetch(config, out, report=lambda line: None)
    weights, settings = out / "small-vae" / "diffusion_pytorch_model.safetensors", out / "small-vae" / "config.json"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    settings.unlink()
    with pytest.raises(PrefetchError) as caught:
        check(out)
    assert "2 of its files" in str(caught.value)
    assert "config.json: missing" in str(caught.value)
    assert "safetensors: changed" in str(caught.value)
    prefetch(config, out, report=lambda line: None)
    assert check(out) == 2
    with pytest.raises(PrefetchError, match="nobody/other: none of its files are there"):
        check(out, config_of("nobody/other"))
    with pytest.raises(PrefetchError, match="has no manifest"):
        check(tmp_path)
    with pytest.raises(MissingModelError, match="/none/vae: not found"):
        prefetch(config_of("/none/vae"), out)


def test_the_encoder_of_an_alignment_is_among_them(vae, tmp_path):
    folder = tmp_path / "dinov2"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (folder / name).write_text(name)
    alignment = {"block": "stages.middle.0", "encoder": {"model": str(folder)}}
    config = parse_config({**TREE, "autoencoder": {"path": str(vae)}, "alignment": alignment}, "test")
    prefetch(config, tmp_path / "weights", report=lambda line: None)
    assert check(tmp_path / "weights", config) == 5
    assert (tmp_path / "weights" / "dinov2" / "preprocessor_config.json").read_text() == "preprocessor_config.json"


@pytest.fixture
def hub(vae) -> Iterator[str]:
    """The autoencoder as a repository of a hub; any other address of it gives the text `extra`."""

    class Repository(Hub):
        def do_HEAD(self) -> None:  # noqa: N802
            self.answer()

        def do_GET(self) -> None:  # noqa: N802
            self.wfile.write(self.answer())

        def answer(self) -> bytes:
            prefix = f"/{NAME}/resolve/main/"
            file = vae / self.path.removeprefix(prefix)
            known = self.path.startswith(prefix) and file.is_file()
            content = file.read_bytes() if known else b"extra" if self.path == "/extra.pt" else b""
            self.send_response(200 if content else 404)
            if not content:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", "c0ffee")
            self.send_header("ETag", f'"{file.name}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            return content

    server = ThreadingHTTPServer(("127.0.0.1", 0), Repository)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "DICO_ALLOW_DOWNLOAD", "DICO_WEIGHTS")}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({**TREE, "autoencoder": {"path": NAME}}))
    command = [sys.executable, "-m", "dico_t2i", "prefetch", "--config", str(config), "--out", "weights", *arguments]
    path = str(Path(__file__).resolve().parents[1])
    extra = {"HF_HUB_CACHE": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": path}
    environment = {**clean, **extra, **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_asks_the_hub_and_what_it_got_is_used_without_network(hub, vae, tmp_path, monkeypatch):
    done = run(tmp_path, "--also", f"{hub}/extra.pt", HF_ENDPOINT=hub)
    assert done.returncode == 0, done.stderr
    assert "3 files in weights" in done.stdout
    weights = tmp_path / "weights"
    assert file_hash(weights / NAME / "config.json") == file_hash(vae / "config.json")
    assert (weights / "files" / "extra.pt").read_text() == "extra"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    with pytest.raises(MissingModelError):
        find_autoencoder(config_of(NAME).autoencoder)
    monkeypatch.setenv("DICO_WEIGHTS", str(weights))
    assert find_autoencoder(config_of(NAME).autoencoder)[0] == weights / NAME / "config.json"


def test_without_network_the_error_is_quick_and_names_the_files(tmp_path):
    done = run(tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2
    assert "http://127.0.0.1:9 cannot be reached" in done.stderr
    assert f"hf download {NAME} config.json diffusion_pytorch_model.safetensors" in done.stderr
    assert not (tmp_path / "weights").exists()
