"""A data set of the Hugging Face hub, from a web server that answers as much as is asked of the hub."""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from test_loader import make_sample

from dico_t2i.data.writer import ShardWriter
from dico_t2i.remote import UrlError, read

NAME = "me/set"
LOAD = f"""
import sys
from dico_t2i.config import CacheConfig
from dico_t2i.data.cache import cached_index
index = cached_index("hf://datasets/{NAME}", CacheConfig(path=sys.argv[1], max_gb=1.0))
for number in range(len(index.names)):
    index.shard(number)
    index.open(number).close()
print(int(index.samples.sum()))
"""


class Hub(SimpleHTTPRequestHandler):
    """The repository NAME, whose files are those of the served folder."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        place = urlsplit(self.path).path
        if place.startswith(f"/api/datasets/{NAME}/tree/"):
            return self.answer(self.listed(sorted(path.name for path in Path(self.directory).iterdir())))
        if place.startswith(f"/api/datasets/{NAME}"):
            return self.answer({"id": NAME, "sha": "c0ffee"})
        self.path = place.removeprefix(f"/datasets/{NAME}/resolve/main")
        return super().do_GET()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        self.answer(self.listed(asked if isinstance(asked, list) else [asked]))

    def listed(self, names):
        files = [Path(self.directory, name) for name in names]
        return [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"}
            for file in files
            if file.is_file()
        ]

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_a_data_set_of_the_hub_is_read_through_the_cache(tmp_path):
    with ShardWriter(tmp_path / "set", samples_per_shard=4) as writer:
        for number in range(8):
            writer.write(make_sample(number))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(tmp_path / "set")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    clean = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "cache")],
        env={**clean, **hub, "DICO_ALLOW_DOWNLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "8\n"
    copied = {path.name for path in (tmp_path / "cache").rglob("[!.]*.tar*")}
    assert copied == {path.name for path in (tmp_path / "set").glob("*.tar*")}


def test_the_hub_is_not_asked_without_permission(monkeypatch):
    monkeypatch.delenv("DICO_ALLOW_DOWNLOAD", raising=False)
    with pytest.raises(UrlError, match="set DICO_ALLOW_DOWNLOAD=1"):
        read(f"hf://datasets/{NAME}/index.json")
