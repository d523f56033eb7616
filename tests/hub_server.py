"""A hub on loopback: the HTTP interface that huggingface_hub speaks, for the repositories of a test."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 4000
"""Bytes from which a file is stored apart: it is sent by a redirect, and uploaded by the protocol of Git LFS."""


@dataclass
class Repository:
    """Commits of files, the newest last, by their ids; `gated` ones are read with an accepted token only."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a commit and return its id."""
        name = hashlib.sha1(f"{len(self.commits)}".encode() + b"".join(files.values())).hexdigest()
        self.commits[name] = files
        return name

    @property
    def head(self) -> str:
        return [*self.commits][-1]


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        repositories: By `owner/name`.
        log: Each request as method, path and `Range`.
        cut: Number of answers with a large file that end after half of it.
        shrink: Whether each file arrives with its last byte missing.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[tuple[str, str, str | None]] = []
        self.cut, self.shrink = 0, False
        self.url = f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, files: dict[str, bytes], **settings: Any) -> str:
        """Add a repository, or a commit to one, and return the commit's id."""
        return self.repositories.setdefault(name, Repository(**settings)).commit(files)


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._logged()
        if path.startswith("/blobs/"):
            return self._send_file(self.server.blobs[path.removeprefix("/blobs/")])
        found = (
            re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
            or re.fullmatch(r"/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path)
        )  # fmt: skip
        if found is None or found[1] not in self.server.repositories:
            return self._refuse(404, "RepoNotFound")
        repository = self.server.repositories[found[1]]
        commit = repository.head if found[3] in (None, "main") else unquote(found[3])
        if commit not in repository.commits:
            return self._refuse(404, "RevisionNotFound")
        files = repository.commits[commit]
        if found[2] == "resolve":
            if repository.gated and self.headers["Authorization"] != "Bearer hf_accepted":
                return self._refuse(403, "GatedRepo")
            name = unquote(found[4])
            return self._send_stored(files[name], commit) if name in files else self._refuse(404, "EntryNotFound")
        if found[2] == "tree":
            return self._answer([_entry(name, data) for name, data in files.items()])
        self._answer({"id": found[1], "sha": commit, "siblings": [{"rfilename": name} for name in files]})

    def do_POST(self) -> None:
        path, body = self._logged(), self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer hf_accepted":
            return self._refuse(403, "")
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}"
            self.server.repositories.setdefault(name, Repository()).commits or self.server.add(name, {})
            return self._answer({"url": f"{self.server.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self._answer({"warnings": [], "errors": []})
        if path.endswith("/preupload/main"):
            return self._answer({"files": [
                {"path": x["path"], "uploadMode": "lfs" if x["size"] > LARGE else "regular", "shouldIgnore": False}
                for x in json.loads(body)["files"]
            ]})  # fmt: skip
        if path.endswith("/objects/batch"):
            return self._answer({"transfer": "basic", "objects": [
                {**x, "actions": {"upload": {"href": f"{self.server.url}/blobs/{x['oid']}"}}}
                for x in json.loads(body)["objects"]
            ]})  # fmt: skip
        self._commit(path.split("/api/models/")[1].removesuffix("/commit/main"), body)

    def do_PUT(self) -> None:
        name, data = self._logged().removeprefix("/blobs/"), self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(data).hexdigest() == name
        self.server.blobs[name] = data
        self._answer({})

    def _commit(self, name: str, body: bytes) -> None:
        repository = self.server.repositories[name]
        files = dict(repository.commits[repository.head])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files)
        self._answer({"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})

    def _logged(self) -> str:
        path = urlsplit(self.path).path
        self.server.log.append((self.command, path, self.headers["Range"]))
        return path

    def _answer(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self._begin(200, {"Content-Type": "application/json", "Content-Length": str(len(data))})
        self.wfile.write(data)

    def _refuse(self, code: int, why: str) -> None:
        self._begin(code, {"X-Error-Code": why, "Content-Length": "0"})

    def _send_stored(self, data: bytes, commit: str) -> None:
        """Send a small file, or the place of a large one."""
        facts = {"X-Repo-Commit": commit, "ETag": f'"{_digest(data)}"'}
        if len(data) <= LARGE:
            return self._send_file(data, facts)
        self.server.blobs[_digest(data)] = data
        facts |= {"X-Linked-Etag": facts["ETag"], "X-Linked-Size": str(len(data)), "Content-Length": "0"}
        elsewhere = self.server.url.replace("127.0.0.1", "localhost")  # another host, as a network of caches is
        self._begin(302, facts | {"Location": f"{elsewhere}/blobs/{_digest(data)}"})

    def _send_file(self, data: bytes, facts: dict[str, str] | None = None) -> None:
        start = int(re.sub(r"\D", "", self.headers["Range"] or "0"))
        part, end = data[start:], len(data) - 1
        facts = {"ETag": f'"{_digest(data)}"', **(facts or {})}
        if start:
            facts["Content-Range"] = f"bytes {start}-{end}/{end + 1}"
        whole = self.command == "HEAD" or not self.server.shrink
        self._begin(206 if start else 200, facts | {"Content-Length": str(len(part) - (not whole))})
        if self.command == "HEAD":
            return
        if self.server.cut and len(data) > LARGE:
            self.server.cut -= 1
            part, self.close_connection = part[: len(part) // 2], True
        self.wfile.write(part if whole else part[:-1])

    def _begin(self, code: int, facts: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in facts.items():
            self.send_header(name, value)
        self.end_headers()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if len(data) > LARGE:
        entry["lfs"] = {"oid": _digest(data), "size": len(data), "pointerSize": 130}
    return entry
