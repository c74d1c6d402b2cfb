"""As much of the Hugging Face hub's HTTP interface as ``snapshot_download`` needs, on 127.0.0.1."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The repositories, and what was asked for."""

    repositories: dict[str, dict[str, bytes]]
    gated: frozenset[str] = frozenset()
    broken: frozenset[str] = frozenset()
    fetched: list[str] = field(default_factory=list)
    url: str = ""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(send_body=False)

        def do_GET(self) -> None:
            self.answer(send_body=True)

        def answer(self, send_body: bool) -> None:
            path = self.path.partition("?")[0]
            status, headers, body = self.api(path) if path.startswith("/api/models/") else self.file(path, send_body)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if send_body:
                self.wfile.write(body)

        def api(self, path: str) -> tuple[int, dict[str, str], bytes]:
            match = re.fullmatch(r"/api/models/(?P<name>.+?)(/(?P<what>revision|tree)/(?P<revision>[^/]+))?", path)
            assert match is not None
            name = match["name"]
            if name in hub.broken:
                return 500, {}, b"down for repairs"
            if name not in hub.repositories:
                return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
            if match["revision"] not in (None, "main", SHA):
                return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b""
            files = hub.repositories[name]
            if match["what"] == "tree":
                value: Any = [{"type": "file", "path": file, "size": len(files[file]), "oid": file} for file in files]
            else:
                siblings = [{"rfilename": file} for file in files]
                value = {"id": name, "sha": SHA, "private": False, "tags": [], "siblings": siblings}
            return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

        def file(self, path: str, fetched: bool) -> tuple[int, dict[str, str], bytes]:
            match = re.fullmatch(r"/(?P<name>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path)
            if match is None:
                return 404, {}, b""
            if match["name"] in hub.gated:
                return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b""
            body = hub.repositories[match["name"]][match["file"]]
            if fetched:
                hub.fetched.append(f"{match['name']}/{match['file']}")
            etag = hashlib.sha1(body).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}, body

    return Handler


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve ``hub`` at ``hub.url`` until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
