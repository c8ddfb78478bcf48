"""Hub ids: through a prepared cache without a network, and through an endpoint on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from time_limits import PATIENCE_S
from transom.models.checkpoint import cannot_write

MakeCheckpoint = Callable[..., Path]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OPEN = """
import sys
from transom.models.checkpoint import open_checkpoint
from transom.runtime.errors import CheckpointError
try:
    checkpoint = open_checkpoint(sys.argv[1], {})
    print(checkpoint.name, checkpoint.source, len(checkpoint.weight_files), checkpoint.config_json["model_type"])
except CheckpointError as error:
    print("CheckpointError:", error)
"""


def open_by_id(source: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", OPEN, source],
        capture_output=True,
        text=True,
        env={**clean, **environment},
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def hub(bert_checkpoint: Path) -> Iterator[str]:
    """The address of a server that answers as the hub does, for ``someone/tiny`` and ``someone/pickled``.

    The first has its weights in both formats, the second as a pickle only; no pickle may be asked for.
    """
    tiny = {path.name: path.read_bytes() for path in bert_checkpoint.iterdir()} | {"pytorch_model.bin": b"a pickle"}
    repositories = {
        "someone/tiny": tiny,
        "someone/pickled": {name: data for name, data in tiny.items() if not name.endswith(".safetensors")},
    }

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(send=True)

        def do_HEAD(self) -> None:
            self.answer(send=False)

        def answer(self, send: bool) -> None:
            api = self.path.startswith("/api/models/")
            owner, name, *rest = self.path.removeprefix("/api/models" if api else "").strip("/").split("/")
            files = repositories.get(f"{owner}/{name}")
            if files is None:
                return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, send)
            if api:
                tree = [{"type": "file", "path": n, "size": len(d), "oid": COMMIT} for n, d in files.items()]
                info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
                body = json.dumps(tree if rest[:1] == ["tree"] else info).encode()
                return self.reply(200, body, {"Content-Type": "application/json"}, send)
            wanted = rest[-1]
            if wanted not in files:
                return self.reply(404, b"{}", {}, send)
            assert wanted != "pytorch_model.bin", "a pickle was downloaded"
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(files[wanted]).hexdigest()}"'}
            return self.reply(200, files[wanted], headers, send)

        def reply(self, status: int, body: bytes, headers: dict[str, str], send: bool) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if send:
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_id_through_an_endpoint_then_from_the_cache_alone(hub: str, tmp_path: Path) -> None:
    online = open_by_id("someone/tiny", HF_ENDPOINT=hub, HF_HOME=str(tmp_path), NO_PROXY="127.0.0.1")
    assert online == "tiny someone/tiny 1 bert"
    offline = open_by_id("someone/tiny", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert offline == "tiny someone/tiny 1 bert"


def test_what_the_hub_does_not_have(hub: str, tmp_path: Path) -> None:
    online = open_by_id("someone/absent", HF_ENDPOINT=hub, HF_HOME=str(tmp_path), NO_PROXY="127.0.0.1")
    assert online.startswith("CheckpointError: 'someone/absent' is no folder here and the hub did not give it")
    offline = open_by_id("someone/tiny", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "did not give it" in offline
    assert "Check the name and the connection" in offline
    assert "\n" not in offline


def test_a_repository_with_pickled_weights_only(hub: str, tmp_path: Path) -> None:
    said = open_by_id("someone/pickled", HF_ENDPOINT=hub, HF_HOME=str(tmp_path), NO_PROXY="127.0.0.1")
    assert said.startswith("CheckpointError: someone/pickled has its weights only as pytorch_model.bin")
    assert "save_pretrained('pickled-safe')" in said


def test_a_cache_that_cannot_be_written_fails_no_download(hub: str, tmp_path: Path) -> None:
    """A file lies where the cache should be: what is downloaded goes with the process."""
    (tmp_path / "file").write_text("in the way")
    here = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "file"), "NO_PROXY": "127.0.0.1", "TMPDIR": str(tmp_path)}
    assert open_by_id("someone/tiny", **here) == "tiny someone/tiny 1 bert"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert "did not give it" in open_by_id("someone/absent", **here)


def test_without_a_home_the_cache_is_not_a_folder_called_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is no home folder" in (cannot_write(Path("~/.cache/huggingface/hub")) or "")
    assert list(tmp_path.iterdir()) == []
    assert cannot_write(tmp_path / "new" / "cache") is None
