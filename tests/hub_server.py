"""A hub on loopback: enough of the model hub's HTTP interface for downloads and uploads, with failures on request."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from nla_utils.config import ROOT

LARGE = (".safetensors", ".pt")


@dataclass
class Hub:
    """``files``: repo → path → bytes. ``refuse``: repo → (status, error code). ``lie``: paths whose bytes are altered.
    ``short``: paths of which half is sent as if it were all. ``cut``: paths whose first transfer stops in the middle.
    ``ranges``: what was asked for in parts. ``objects``: large files by sha256, as they were uploaded."""

    files: dict = field(default_factory=dict)
    refuse: dict = field(default_factory=dict)
    lie: set = field(default_factory=set)
    short: set = field(default_factory=set)
    cut: set = field(default_factory=set)
    ranges: list = field(default_factory=list)
    served: list = field(default_factory=list)
    objects: dict = field(default_factory=dict)

    def commit(self, repo: str) -> str:
        digest = hashlib.sha1(repo.encode())
        for path, data in sorted(self.files[repo].items()):
            digest.update(path.encode() + hashlib.sha256(data).digest())
        return digest.hexdigest()

    def environment(self, cache, **more) -> dict:
        """The variables of a program that is to fetch from here, into ``cache`` alone."""
        own = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NLA_CACHE": str(cache),
            "HF_HOME": str(cache / "home"),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        }
        return {**os.environ, **own, **more}

    def start(self) -> str:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    # An answer's body would wait for the client to acknowledge its head.
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'org'}/{wanted['name']}"
            self.hub.files.setdefault(repo, {})
            return self._json({"url": f"http://{self.headers['Host']}/{repo}"})
        if path.endswith("/objects/batch"):
            return self._json({"transfer": "basic", "objects": [self._upload(o) for o in json.loads(body)["objects"]]})
        action = re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if action and action[2] == "preupload":
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if action:
            return self._commit(action[1], [json.loads(line) for line in body.splitlines() if line.strip()])
        self._send(404, b"")

    def do_PUT(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.objects[self.path.rsplit("/", 1)[1]] = body
        self._send(200, b"")

    def _upload(self, wanted: dict) -> dict:
        href = f"http://{self.headers['Host']}/objects/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": href, "header": {}}}}

    def _commit(self, repo: str, lines: list[dict]):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                self.hub.files[repo][value["path"]] = self.hub.objects[value["oid"]]
        commit = self.hub.commit(repo)
        self._json({"commitOid": commit, "commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{commit}"})

    def _json(self, value: dict):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def do_GET(self):
        path = self.path.split("?")[0].replace("/datasets/", "/", 1) if "/api/" not in self.path else self.path
        path = path.split("?")[0]
        api = re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*)?", path)
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
        if path in self.hub.short:
            data = data[: len(data) // 2]
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
    record = {"rfilename": path, "size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    record["oid"] = record["blobId"]
    if path.endswith(LARGE):
        record["lfs"] = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "oid": hashlib.sha256(data).hexdigest(),
            "size": len(data),
            "pointerSize": 130,
        }
    return record
