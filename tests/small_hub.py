"""A Hub on loopback: the few addresses of the real one that huggingface_hub asks when it downloads a model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".model")  # what the real one keeps by git-lfs


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(
        json.dumps(sorted((name, etag(name, data)) for name, data in files.items())).encode()
    ).hexdigest()


def etag(name: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if name.endswith(LARGE) else hashlib.sha1(data).hexdigest()


@dataclass
class SmallHub:
    """Repositories as {name: {branch: {file: content}}}, and how the server behaves."""

    repositories: dict[str, dict[str, dict[str, bytes]]]
    tokens: dict[str, str] = field(default_factory=dict)  # name -> the token that opens it
    gated: set[str] = field(default_factory=set)
    break_after: dict[str, int] = field(default_factory=dict)  # file -> bytes, once
    instead: dict[str, bytes] = field(default_factory=dict)  # file -> what is sent in its place
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range

    def __enter__(self) -> SmallHub:
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def fetched(self) -> list[str]:
        """The files whose content was asked for, in order."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for method, path, _ in self.asked
            if method == "GET" and "/resolve/" in path
        ]


class _Handler(BaseHTTPRequestHandler):
    state: SmallHub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.asked.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/other/"):  # something else on the same server
            return self.send_data(b"<html>Welcome</html>", "text/html")
        if path.startswith("/api/models/"):
            parts = path.removeprefix("/api/models/").split("/", 3)
            owner, name, kind, revision = parts if len(parts) == 4 else (*parts, "revision", "main")
        else:
            owner, name, kind, rest = path[1:].split("/", 3)
            revision, _, file = rest.partition("/")
        name = f"{owner}/{name}"
        files = self.find(name, revision)
        if files is None:
            return
        if kind == "resolve":
            self.send_file(files, file)
        elif kind == "tree":
            self.send_json([{"type": "file", **entry} for entry in map(tree_entry, files.items())])
        else:
            self.send_json({"id": name, "sha": commit_of(files), "siblings": [*map(sibling, files.items())]})

    def find(self, name: str, revision: str) -> dict[str, bytes] | None:
        """The files asked for; None once a refusal is sent."""
        hub = self.state
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in hub.tokens.values():
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if name not in hub.repositories:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if hub.tokens.get(name, token) != token:
            code = "GatedRepo" if name in hub.gated else "RepoNotFound"
            return self.refuse(401, code, "Access is restricted")
        branches = hub.repositories[name]
        commits = {commit_of(files): files for files in branches.values()}
        files = branches.get(revision, commits.get(revision))
        if files is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return files

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, content: object) -> None:
        self.send_data(json.dumps(content).encode(), "application/json")

    def send_data(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_file(self, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        data = self.state.instead.get(name, files[name])
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{etag(name, files[name])}"')
        self.send_header("X-Repo-Commit", commit_of(files))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[begin : self.state.break_after.pop(name, None)])


def sibling(entry: tuple[str, bytes]) -> dict:
    name, data = entry
    known = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
    if name.endswith(LARGE):
        known["lfs"] = {"size": len(data), "sha256": etag(name, data), "pointerSize": 134}
    return known


def tree_entry(entry: tuple[str, bytes]) -> dict:
    name, data = entry
    known = {"path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if name.endswith(LARGE):
        known["lfs"] = {"size": len(data), "oid": etag(name, data), "pointerSize": 134}
    return known
