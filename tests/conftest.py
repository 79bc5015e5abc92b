"""Fixtures that several test files share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pdl_utils.datasets import network, sources


class FileServer(ThreadingHTTPServer):
    """An official source on this machine: `files` by path, the first `truncated` answers cut in half."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.files: dict[str, bytes] = {}
        self.truncated = 0
        self.stalled = threading.Event()  # set: send headers, then nothing
        self.requests = 0


class _Answer(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        self.server.requests += 1
        body = self.server.files.get(self.path.lstrip("/"))
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.stalled.is_set():
            self.connection.settimeout(60)  # not the default, which the client lowers in this process
            self.connection.recv(1)  # until the client gives up
            return
        if self.server.truncated > 0:
            self.server.truncated -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def file_server() -> Iterator[FileServer]:
    """A local HTTP server; fill its `files`."""
    with FileServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def fresh_data(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """An empty data root, a network not yet judged, and none of the user's settings."""
    for name in ("PDL_OFFLINE", "PDL_REQUIRE_REAL", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PDL_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(network, "_network", network.Network())
    monkeypatch.setattr(sources, "PAUSE", 0.0)
