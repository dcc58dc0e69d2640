"""A hub on loopback: enough of the model hub's HTTP interface for downloads and uploads, with failures on request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = (".safetensors", ".pt")


@dataclass
class Hub:
    """``files``: repo → path → bytes. ``refuse``: repo → (status, error code). ``lie``: paths whose bytes are altered.
    ``cut``: paths whose first transfer stops in the middle. ``ranges``: what was asked for in parts."""

    files: dict = field(default_factory=dict)
    refuse: dict = field(default_factory=dict)
    lie: set = field(default_factory=set)
    cut: set = field(default_factory=set)
    ranges: list = field(default_factory=list)
    served: list = field(default_factory=list)

    def commit(self, repo: str) -> str:
        digest = hashlib.sha1(repo.encode())
        for path, data in sorted(self.files[repo].items()):
            digest.update(path.encode() + hashlib.sha256(data).digest())
        return digest.hexdigest()

    def start(self) -> str:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*)?", path)
        if api:
            return self._info(*api.groups())
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if file:
            return self._file(*file.groups())
        self._send(404, b"")

    def _refused(self, repo: str) -> bool:
        if repo in self.hub.refuse:
            status, code = self.hub.refuse[repo]
            self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})
            return True
        if repo not in self.hub.files:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return True
        return False

    def _info(self, repo: str, kind: str | None, revision: str | None):
        if self._refused(repo):
            return
        commit = self.hub.commit(repo)
        if revision not in (None, "main", commit):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = [_record(p, d) for p, d in self.hub.files[repo].items()]
        if kind == "tree":
            return self._send(200, json.dumps([{**f, "type": "file", "path": f["rfilename"]} for f in files]).encode())
        self._send(200, json.dumps({"id": repo, "modelId": repo, "sha": commit, "siblings": files}).encode())

    def _file(self, repo: str, revision: str, path: str):
        if self._refused(repo):
            return
        data = self.hub.files[repo].get(path)
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.hub.commit(repo), "Accept-Ranges": "bytes"}
        if path in self.hub.lie:
            data = bytes(len(data))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            first = int(wanted[1])
            self.hub.ranges.append((path, first))
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            return self._send(206, data[first:], headers)
        if self.command == "GET":
            self.hub.served.append(path)
        if self.command == "GET" and path in self.hub.cut:
            self.hub.cut.discard(path)
            return self._cut(data, headers)
        self._send(200, data, headers)

    def _cut(self, data: bytes, headers: dict):
        """Half of what was announced, then the connection closes."""
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)

    def _send(self, status: int, body: bytes, headers: dict | None = None):
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _record(path: str, data: bytes) -> dict:
    record = {"rfilename": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if path.endswith(LARGE):
        record["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "oid": hashlib.sha256(data).hexdigest(),
                         "size": len(data), "pointerSize": 130}  # fmt: skip
    return record


def decode_line(value: dict) -> bytes:
    """Content of one file line of a commit request."""
    return base64.b64decode(value["content"])
