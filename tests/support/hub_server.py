"""A stand-in for the Hugging Face hub on 127.0.0.1: the few answers huggingface-hub needs to list and fetch files.

    with HubServer({"user/repo": {"m-Q4_K_M.gguf": data}}) as hub:
        ...run something with HF_ENDPOINT=hub.url...

"user/repo@v2" is another revision of it, of commit OTHER. `gated` repositories answer 401 as the hub does, `broken`
counts down transfers that stop half-way, `lie` makes the stated sha256 wrong, and `requests` keeps every request line
with its Range.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
OTHER = "beef" + "0" * 36


@dataclass
class HubServer:
    """The repositories (name -> file -> content) and how they misbehave."""

    repos: dict[str, dict[str, bytes]]
    gated: tuple[str, ...] = ()
    broken: int = 0
    lie: bool = False
    requests: list[str] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        wanted = request.headers.get("Range", "")
        self.requests.append(f"{request.command} {path} {wanted}".strip())
        if path.startswith("/api/models/"):
            repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            file = None
        else:
            repo, _, rest = path[1:].partition("/resolve/")
            revision, _, file = rest.partition("/")
        if revision not in ("", "main"):
            repo = f"{repo}@{revision}"
        if repo in self.gated:
            return self._send(request, 401, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        if repo not in self.repos:
            return self._send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if file is None:
            return self._send(request, 200, self._listing(repo), {"Content-Type": "application/json"}, body)
        data = self.repos[repo].get(file)
        if data is None:
            return self._send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)
        headers = {
            "ETag": f'"{self._sha256(data)}"',
            "X-Repo-Commit": OTHER if "@" in repo else COMMIT,
            "X-Linked-Etag": f'"{self._sha256(data)}"',
            "X-Linked-Size": str(len(data)),
        }
        first = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        return self._send(request, 206 if first else 200, data[first:], headers, body)

    def _sha256(self, data: bytes) -> str:
        return "0" * 64 if self.lie else hashlib.sha256(data).hexdigest()

    def _listing(self, repo: str) -> bytes:
        files = [
            {"rfilename": name, "size": len(data),
             "lfs": {"sha256": self._sha256(data), "size": len(data), "pointerSize": 130}}
            for name, data in self.repos[repo].items()
        ]  # fmt: skip
        return json.dumps(
            {"id": repo, "modelId": repo, "sha": OTHER if "@" in repo else COMMIT, "siblings": files}
        ).encode()

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str], body: bool
    ) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if not body:
            return
        if self.broken and "X-Repo-Commit" in headers:
            self.broken -= 1
            request.wfile.write(data[: len(data) // 2])
            request.wfile.flush()
            request.close_connection = True
            request.connection.shutdown(2)
            return
        request.wfile.write(data)
