"""A small Hugging Face Hub in memory: what huggingface_hub asks of it never leaves the process.

There are model repositories with one branch, ``main``. Owners see and change what is theirs, and nobody else
gets into a private or gated one. Weights are LFS objects, everything else comes with the commit.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote

import httpx2
import pytest
import yaml
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory, hf_request_event_hook

TOKENS = {"hf_writer": ("alice", True), "hf_reader": ("alice", False), "hf_stranger": ("bob", True)}


class Commit(NamedTuple):
    """The whole repository after it."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    name: str
    private: bool
    gated: str | bool = False
    commits: list[Commit] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS uploads by sha256, committed or not


class Change(NamedTuple):
    """What was asked for, and what anybody could download from then on: old commits stay reachable."""

    kind: str
    repo: str
    exposed: set[str]


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", **body: Any) -> None:
        self.answer = httpx2.Response(status, json=body, headers={"X-Error-Code": code})


class FakeHub:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.log: list[Change] = []
        self.faults: dict[str, int] = {}  # what fails once, with which status
        self._lock = threading.Lock()

    @contextmanager
    def running(self, cache: Any) -> Iterator[None]:
        """huggingface_hub talks to it, as alice; its own settings are of when it was imported."""
        hooks = {"request": [hf_request_event_hook]}
        transport = httpx2.MockTransport(self._serve)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_TOKEN", "hf_writer")
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            patch.setattr(constants, "HF_HUB_CACHE", str(cache))
            set_client_factory(lambda: httpx2.Client(transport=transport, event_hooks=hooks))
            try:
                yield
            finally:
                set_client_factory(default_client_factory)

    def _serve(self, request: httpx2.Request) -> httpx2.Response:
        parts = [unquote(part) for part in request.url.path.split("/")[1:]]
        request.read()
        try:
            with self._lock:
                answer = self._answer(request, request.method, *parts)
        except Refusal as refusal:
            return refusal.answer
        return answer if isinstance(answer, httpx2.Response) else httpx2.Response(200, json=answer)

    def _answer(self, request: httpx2.Request, *asked: str) -> Any:
        user, can_write = TOKENS.get(request.headers.get("Authorization", "")[7:], ("", False))

        def repo(owner: str, name: str, write: bool = True) -> Repo:
            found = self.repos.get(f"{owner}/{name}")
            if found is None or found.private and user != owner:
                raise Refusal(404, "RepoNotFound")
            if write and not (user == owner and can_write):
                raise Refusal(403)
            return found

        match asked:
            case ("POST", "api", "validate-yaml"):
                yaml.safe_load(json.loads(request.content)["content"].split("---")[1])
                return {"errors": [], "warnings": []}
            case ("POST", "api", "repos", "create"):
                self._fail("create")
                return self._create(json.loads(request.content), user, can_write)
            case ("GET", "api", "models", owner, name) | ("GET", "api", "models", owner, name, "revision", _):
                head = repo(owner, name, write=False).commits[-1]
                return {"id": f"{owner}/{name}", "sha": head.oid, "tags": [], "siblings": []}
            case ("GET", "api", "models", owner, name, "tree", revision):
                files = _at(repo(owner, name, write=False), revision).files
                kind = {"type": "file"}
                return [{**kind, "path": p, "oid": _blob_id(d), "size": len(d)} for p, d in files.items()]
            case ("GET", "api", "models", owner, name, "auth-check", "write"):
                return {} if repo(owner, name) else None
            case ("PUT", "api", "models", owner, name, "settings"):
                self._fail("settings")
                settings = json.loads(request.content)
                found = repo(owner, name)
                found.gated = settings.get("gated", found.gated)
                found.private = settings.get("visibility", "private" * found.private) == "private"
                return self._changed("settings", found)
            case ("POST", "api", "models", owner, name, "preupload", "main"):
                self._fail("preupload")
                files = repo(owner, name).commits[-1].files
                paths = [file["path"] for file in json.loads(request.content)["files"]]
                return {"files": [_upload_mode(path, files.get(path)) for path in paths]}
            case ("POST", owner, name, "info", "lfs", "objects", "batch"):
                found = repo(owner, name.removesuffix(".git"))
                href = f"{constants.ENDPOINT}/lfs/{found.name}"
                objects = json.loads(request.content)["objects"]
                for item in objects:
                    item["actions"] = {"upload": {"href": f"{href}/{item['oid']}"}}
                return {"transfer": "basic", "objects": objects}
            case ("PUT", "lfs", owner, name, oid):  # without a token, as to a presigned address
                self._fail("upload")
                self.repos[f"{owner}/{name}"].objects[oid] = request.content
                return {}
            case ("POST", "api", "models", owner, name, "commit", "main"):
                self._fail("commit")
                return self._commit(repo(owner, name), request.content)
            case ("GET" | "HEAD", owner, name, "resolve", revision, path):
                return self._resolve(repo(owner, name, write=False), user, revision, path)
        raise Refusal(501, f"no answer to {asked}")

    def _fail(self, what: str) -> None:
        if what in self.faults:
            raise Refusal(self.faults.pop(what))

    def _changed(self, kind: str, repo: Repo) -> dict[str, Any]:
        exposed = set() if repo.private or repo.gated else {p for c in repo.commits for p in c.files}
        self.log.append(Change(kind, repo.name, exposed))
        oid = repo.commits[-1].oid
        url = f"{constants.ENDPOINT}/{repo.name}"
        return {"url": url, "commitUrl": f"{url}/commit/{oid}", "commitOid": oid}

    def _create(self, asked: dict[str, Any], user: str, can_write: bool) -> dict[str, Any]:
        owner = asked.get("organization") or user
        if owner != user or not can_write:
            raise Refusal(403)
        name = f"{owner}/{asked['name']}"
        if name in self.repos:
            raise Refusal(409, url=f"{constants.ENDPOINT}/{name}")
        self.repos[name] = Repo(name, asked.get("visibility") == "private", commits=[_new("", {})])
        return self._changed("create", self.repos[name])

    def _commit(self, repo: Repo, content: bytes) -> dict[str, Any]:
        message, files = "", dict(repo.commits[-1].files)
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = repo.objects[value["oid"]]
        repo.commits.append(_new(message, files))
        return self._changed("commit", repo)

    def _resolve(self, repo: Repo, user: str, revision: str, path: str) -> httpx2.Response:
        if repo.gated and user != repo.name.split("/")[0]:
            raise Refusal(403, "GatedRepo")
        commit = _at(repo, revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            return httpx2.Response(404, headers={**headers, "X-Error-Code": "EntryNotFound"})
        content = commit.files[path]
        return httpx2.Response(200, content=content, headers={**headers, "ETag": f'"{_blob_id(content)}"'})


def _at(repo: Repo, revision: str) -> Commit:
    for commit in reversed(repo.commits):
        if revision in ("main", commit.oid):
            return commit
    raise Refusal(404, "RevisionNotFound")


def _new(message: str, files: dict[str, bytes]) -> Commit:
    named = json.dumps([message, sorted((path, _blob_id(data)) for path, data in files.items())])
    return Commit(hashlib.sha1(named.encode()).hexdigest(), message, files)


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _upload_mode(path: str, there: bytes | None) -> dict[str, Any]:
    """And what names the content that is there already: a client does not upload the same again."""
    lfs = path.endswith((".safetensors", ".pt", ".pth", ".bin"))
    name = hashlib.sha256(there).hexdigest() if lfs and there else there and _blob_id(there)
    mode = "lfs" if lfs else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": name}
