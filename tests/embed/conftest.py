"""A model hub on loopback, for the library's own client to fetch from."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


class Hub(ThreadingHTTPServer):
    """As much of the hub's protocol as fetching files and snapshots takes."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, list[str]()
        super().__init__(("127.0.0.1", 0), Answer)

    def put(self, model: str, *names: str) -> None:
        """Hold files of a model; the content of each is its name."""
        for name in names:
            (self.root / model / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / model / name).write_text(name)

    def run(self, code: str, directory: Path) -> subprocess.CompletedProcess[str]:
        """Run code in a process of its own, since the client reads its environment when it is imported."""
        env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HUB_OFFLINE": "0"}
        env |= {"HF_HOME": str(self.root / "home")}
        command = [sys.executable, "-c", f"import sys; from pathlib import Path; {code}", str(directory)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.reply(body=True)

    def do_HEAD(self) -> None:
        self.reply(body=False)

    def reply(self, body: bool) -> None:
        self.server.asked.append(self.path)
        path = self.path.partition("?")[0].removeprefix("/")
        found = self.described(path) if path.startswith("api/models/") else self.file(path)
        if found is None:
            self.send_error(404)
            return
        content, headers = found
        self.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(content)), "X-Repo-Commit": "c" * 40}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def described(self, path: str) -> tuple[bytes, dict[str, str]] | None:
        model = "/".join(path.split("/")[2:4])
        folder = self.server.root / model
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        tree = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": "0" * 40} for n, p in files.items()]
        info = {"id": model, "sha": "c" * 40, "siblings": [{"rfilename": n} for n in files]}
        content: Any = tree if "/tree/" in path else info
        return (json.dumps(content).encode(), {"Content-Type": "application/json"}) if files else None

    def file(self, path: str) -> tuple[bytes, dict[str, str]] | None:
        parts = path.split("/", 4)  # org, name, resolve, revision, file
        place = self.server.root / "/".join(parts[:2]) / parts[-1]
        if len(parts) < 5 or not place.is_file():
            return None
        content = place.read_bytes()
        return content, {"ETag": f'"{hashlib.sha256(content).hexdigest()[:40]}"'}

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    server = Hub(tmp_path / "hub")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
