"""A stand-in for the Hugging Face Hub in this process, which serves repositories of small files by the hub's protocol.

Requests come from ``huggingface_hub`` itself, which is unchanged except that it sends them to another address.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_of_a_test"


def commit_of(branch: str) -> str:
    """The hash of a branch's last commit, which never changes here."""
    return hashlib.sha1(branch.encode()).hexdigest()


class Hub:
    """``files``: repository → branch → path → content. Reading private repositories and writing to any one takes TOKEN."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._file()

    def do_GET(self) -> None:
        self._file()

    def _file(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        found = re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", self.path)
        repository, revision, path = found.groups() if found else ("", "", "")
        branches = self.hub.files.get(repository)
        branch = next((name for name in branches or () if revision in (name, commit_of(name))), None)
        if branches is None or (repository in self.hub.private and not self._knows_token()):
            self._answer(401, error="RepoNotFound")
        elif branch is None:
            self._answer(404, error="RevisionNotFound")
        elif path not in branches[branch]:
            self._answer(404, error="EntryNotFound")
        else:
            self._answer(200, branches[branch][path], commit=commit_of(branch))

    def do_POST(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._knows_token():
            return self._answer(401, error="Unauthorized")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            if name in self.hub.files:
                return self._json({"url": f"{self.address}/{name}"}, status=409)
            self.hub.files[name] = {"main": {}}
            if asked.get("private") or asked.get("visibility") == "private":  # depends on the version of huggingface_hub
                self.hub.private.add(name)
            return self._json({"url": f"{self.address}/{name}"})
        found = re.fullmatch(r"/api/models/(.+)/(branch|preupload|commit)/([^/?]+)(\?.*)?", self.path)
        if found is None:
            return self._answer(404)
        repository, what, revision, _ = found.groups()
        branches = self.hub.files[repository]
        if what == "branch":
            branches.setdefault(revision, dict(branches["main"]))
            return self._json({})
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return self._json({"files": [{"path": file["path"]} | modes for file in files]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.hub.messages.append(line["value"]["summary"])
            else:
                branches[revision][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = commit_of(revision)
        return self._json({"commitOid": commit, "commitUrl": f"{self.address}/{repository}/commit/{commit}"})

    @property
    def address(self) -> str:
        return self.hub.address

    def _knows_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _json(self, content: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode())

    def _answer(self, status: int, content: bytes = b"", *, error: str | None = None, commit: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        if error is not None:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
