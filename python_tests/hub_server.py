# SPDX-License-Identifier: Apache-2.0
"""A model hub on this machine.

It answers the requests by which ``huggingface_hub`` creates a repository, uploads files (small ones
in the commit, weights by Git LFS), and downloads them again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "1" * 40  # it keeps one version of each file
_LFS = (".safetensors", ".bin")


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        files: {(repository, path): content}.
        messages: of the commits.
        tokens: with which requests were authorised.
        unknown: requests that it cannot answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: set[str] = set()
        self.files: dict[tuple[str, str], bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.tokens: set[str | None] = set()
        self.unknown: list[str] = []

    def names(self, repository: str) -> list[str]:
        return sorted(path for name, path in self.files if name == repository)


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Log nothing: pytest would show it among the tests' output."""

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _answer(self, body: object, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _unknown(self) -> None:
        self.server.unknown.append(f"{self.command} {self.path}")
        self._answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

    def do_POST(self) -> None:
        hub, data, path = self.server, self._read(), unquote(self.path)
        hub.tokens.add(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            hub.repositories.add(name)
            self._answer({"url": f"{hub.url}/{name}", "id": name, "name": name})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(_LFS) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(data)["files"]
            ]
            self._answer({"files": files})
        elif re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**found, "actions": {"upload": {"href": f"{hub.url}/lfs/{found['oid']}"}}}
                for found in json.loads(data)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            for line in data.splitlines():
                self._commit(found[1], json.loads(line))
            url = f"{hub.url}/{found[1]}/commit/{COMMIT}"
            self._answer({"commitUrl": url, "commitOid": COMMIT, "success": True})
        else:
            self._unknown()

    def _commit(self, repository: str, line: dict) -> None:
        value = line["value"]
        if line["key"] == "header":
            self.server.messages.append(value["summary"])
        elif line["key"] == "file":
            self.server.files[repository, value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            self.server.files[repository, value["path"]] = self.server.objects[value["oid"]]

    def do_PUT(self) -> None:
        data, name = self._read(), self.path.removeprefix("/lfs/")
        if hashlib.sha256(data).hexdigest() != name:
            self._answer({"error": "other content"}, 400)
            return
        self.server.objects[name] = data
        self._answer({})

    def do_GET(self) -> None:
        hub, path = self.server, unquote(self.path.partition("?")[0])
        hub.tokens.add(self.headers.get("Authorization"))
        if found := re.fullmatch(rf"/(.+)/resolve/(main|{COMMIT})/(.+)", path):
            data = hub.files.get((found[1], found[3]))
            if data is None:
                self._answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                return
            tag = f'"{hashlib.sha256(data).hexdigest()}"'
            self._answer(data, ETag=tag, X_Repo_Commit=COMMIT)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            siblings = [{"rfilename": name} for name in hub.names(found[1])]
            self._answer({"id": found[1], "sha": COMMIT, "siblings": siblings, "tags": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+(/.+)?", path):
            names = [] if found[2] else hub.names(found[1])
            sizes = [{"path": n, "size": len(hub.files[found[1], n])} for n in names]
            self._answer([{"type": "file", "oid": "0" * 40, **size} for size in sizes])
        else:
            self._unknown()

    do_HEAD = do_GET
