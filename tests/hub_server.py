"""A small Hugging Face Hub, in memory and in the test's own process, for code that talks to the real one.

huggingface_hub reads its environment when it is imported, so the code under test runs in a subprocess:

    with HubServer() as server:
        env = os.environ | server.environment() | {"HF_HOME": str(tmp_path)}
        subprocess.run([sys.executable, "publish.py"], env=env, check=True)
        assert "config.json" in server.repo("alice/model").commits[-1].files
        assert not any(event.exposed for event in server.log)  # nothing was ever open to everybody

There are model repos with one branch, `main`. Files come as regular ones or as single-part LFS; Xet, pull
requests, .gitignore and byte ranges are left out. Owners see and change what is theirs, and nobody else gets
into a gated repo. Reading without a token is answered as to a stranger (404 RepoNotFound, 403 GatedRepo).
"""

import base64
import hashlib
import json
import secrets
import threading
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

Gated = Literal["auto", "manual", False]
Upload = Literal["create", "preupload", "lfs_batch", "upload", "commit", "settings"]
Endpoint = Upload | Literal["resolve"]
Change = Literal["create", "settings", "commit"]

# The .gitattributes of a new repo: what it names goes to LFS, as does everything above 10 MB.
LFS_PATTERNS = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy "
    "*.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* "
    "*.tar.* *.tar *.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents*"
).split()
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)


@dataclass(frozen=True)
class Commit:
    """The whole repo after one commit; `lfs` are the paths in it that are LFS objects."""

    oid: str
    message: str
    files: dict[str, bytes]
    lfs: frozenset[str] = frozenset()

    def entries(self) -> dict[str, dict[str, Any]]:
        """The Hub's description of every file and folder."""
        entries: dict[str, dict[str, Any]] = {}
        for path, data in self.files.items():
            for folder in map(str, PurePosixPath(path).parents[:-1]):
                entries[folder] = {"type": "directory", "path": folder, "oid": _git_oid(folder.encode())}
            entries[path] = {"type": "file", "path": path, "oid": _git_oid(data), "size": len(data)}
            if path in self.lfs:
                sha = self.content_id(path)
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(data)}\n"
                entries[path]["oid"] = _git_oid(pointer.encode())
                entries[path]["lfs"] = {"oid": sha, "size": len(data), "pointerSize": len(pointer)}
        return dict(sorted(entries.items()))

    def content_id(self, path: str) -> str:
        """What names the content in ETags and tells a client that an upload would change nothing."""
        data = self.files[path]
        return hashlib.sha256(data).hexdigest() if path in self.lfs else _git_oid(data)


@dataclass
class Repo:
    id: str
    private: bool
    gated: Gated = False
    commits: list[Commit] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS uploads by sha256, committed or not yet


@dataclass(frozen=True)
class Event:
    """A repo right after a change; `files` are all paths in its history, for old commits stay reachable."""

    kind: Change
    repo: str
    private: bool
    gated: Gated
    files: frozenset[str]

    @property
    def exposed(self) -> frozenset[str]:
        """What anybody could download from then on, but for the .gitattributes that the Hub itself writes."""
        return frozenset() if self.private or self.gated else self.files - {".gitattributes"}


class HubServer:
    """The Hub at `url` while the `with` block lasts.

    `tokens` maps a token to (user, can_write); `token` is the first that can write, `user` its owner.
    `log` has all changes in order.
    """

    def __init__(self, tokens: dict[str, tuple[str, bool]] | None = None) -> None:
        default = {"hf_writer": ("alice", True), "hf_reader": ("alice", False), "hf_stranger": ("bob", True)}
        self.tokens = tokens or default
        self.token = next(token for token, (_, can_write) in self.tokens.items() if can_write)
        self.user = self.tokens[self.token][0]
        self._repos: dict[str, Repo] = {}
        self.log: list[Event] = []
        self._faults: defaultdict[str, list[int]] = defaultdict(list)
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environment(self, token: str | None = None) -> dict[str, str]:
        """Variables that point a subprocess here, with the writer's token or the given one ("" for none)."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token if token is None else token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",  # conftest.py turns it on for the other tests
            "NO_PROXY": "127.0.0.1",
        }

    def repo(self, repo_id: str) -> Repo:
        return self._repos[repo_id]

    def fail(self, endpoint: Endpoint, status: int = 500, times: int = 1) -> None:
        """Answers the next `times` requests to `endpoint` with `status` and does nothing else for them.

        huggingface_hub tries 408, 429, 500, 502, 503, 504 six times, but not in create, settings and commit.
        """
        self._faults[endpoint] += [status] * times

    def _changed(self, kind: Change, repo: Repo) -> None:
        files = frozenset(path for commit in repo.commits for path in commit.files)
        self.log.append(Event(kind, repo.id, repo.private, repo.gated, files))


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        self.status, self.body = status, {"error": message} | body
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class _Handler(BaseHTTPRequestHandler):
    """The protocol. Requests are answered one at a time, so that `log` tells the one order of things."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body go out in two writes, which would wait on each other

    def __init__(self, hub: HubServer, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that went away
            super().handle()

    def log_message(self, *args: object) -> None:
        pass

    def _serve(self) -> None:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.split("/")[1:]]
        self.reply_headers: dict[str, str] = {}
        status = 200
        try:
            with self.hub._lock:
                answer = self._answer(parts, parse_qs(url.query))
        except _Refusal as refusal:
            status, answer = refusal.status, refusal.body
            self.reply_headers |= refusal.headers
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in (self.reply_headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _answer(self, parts: list[str], query: dict[str, list[str]]) -> Any:
        match [self.command, *parts]:
            case ["POST", "api", "validate-yaml"]:
                return self._validate_card(json.loads(self._receive())["content"])
            case ["POST", "api", "repos", "create"]:
                return self._create(json.loads(self._receive("create")))
            case ["GET", "api", "models", owner, name]:
                return self._info(self._repo(owner, name), "main")
            case ["GET", "api", "models", owner, name, "auth-check", "write"]:
                return {} if self._repo(owner, name, write=True) else {}
            case ["GET", "api", "models", owner, name, "revision", revision]:
                return self._info(self._repo(owner, name), revision)
            case ["PUT", "api", "models", owner, name, "settings"]:
                asked = json.loads(self._receive("settings"))
                return self._settings(self._repo(owner, name, write=True), asked)
            case ["GET", "api", "models", owner, name, "tree", revision, *path]:
                entries = _at(self._repo(owner, name), revision).entries()
                folder = "".join(f"{part}/" for part in path)
                return _tree(entries, folder, query.get("recursive") == ["true"])
            case ["POST", "api", "models", owner, name, "preupload", revision]:
                asked = json.loads(self._receive("preupload"))["files"]
                head = _at(self._repo(owner, name, write=True), revision)
                return {"files": [_upload_mode(head, file["path"], file["size"]) for file in asked]}
            case ["POST", owner, name, "info", "lfs", "objects", "batch"]:
                asked = json.loads(self._receive("lfs_batch"))["objects"]
                return self._lfs_batch(self._repo(owner, name.removesuffix(".git"), write=True), asked)
            case ["PUT", "lfs", owner, name, oid]:  # asked with no token, like a presigned storage address
                data = self._receive("upload")
                if hashlib.sha256(data).hexdigest() != oid:
                    raise _Refusal(400, "The content does not match its sha256")
                self.hub._repos[f"{owner}/{name}"].objects[oid] = data
                return {}
            case ["POST", "api", "models", owner, name, "commit", revision]:
                lines = [json.loads(line) for line in self._receive("commit").splitlines()]
                return self._commit(self._repo(owner, name, write=True), revision, lines)
            case ["GET" | "HEAD", owner, name, "resolve", revision, *path]:
                self._receive("resolve")
                return self._resolve(self._repo(owner, name), revision, "/".join(path))
        self._receive()
        raise _Refusal(501, f"hub_server.py does not know {self.command} {self.path}")

    def _receive(self, endpoint: str = "") -> bytes:
        """The body, read before all decisions, as the next request would start with what is left of it."""
        size = int(self.headers.get("Content-Length", 0))  # huggingface_hub sends it with every body
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionAbortedError("the client went away")
        if faults := self.hub._faults[endpoint]:
            self.reply_headers["Retry-After"] = "0"  # a client's wait is one second then, not up to eight
            raise _Refusal(faults.pop(0), "A fault that the test asked for")
        return body

    def _credentials(self) -> tuple[str, bool]:
        header = self.headers.get("Authorization")
        if header is None:
            return "", False
        token = header.removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def _check_write(self, owner: str) -> None:
        user, can_write = self._credentials()
        if user != owner or not can_write:
            raise _Refusal(403 if user else 401, f'No right to write under the namespace "{owner}"')

    def _repo(self, owner: str, name: str, write: bool = False) -> Repo:
        user, _ = self._credentials()
        repo = self.hub._repos.get(f"{owner}/{name}")
        if repo is None or (repo.private and user != owner):
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        if write:
            self._check_write(owner)
        return repo

    def _validate_card(self, content: str) -> dict[str, Any]:
        try:
            yaml.safe_load(content.split("---")[1] if content.startswith("---") else "")
        except yaml.YAMLError as error:
            raise _Refusal(400, "Invalid metadata", errors=[{"message": str(error)}]) from None
        return {"errors": [], "warnings": []}

    def _create(self, asked: dict[str, Any]) -> dict[str, Any]:
        owner = asked["organization"] or self._credentials()[0]
        self._check_write(owner)
        repo = Repo(f"{owner}/{asked['name']}", asked.get("visibility") == "private")
        url = f"{self.hub.url}/{repo.id}"
        if repo.id in self.hub._repos:
            raise _Refusal(409, "You already created this model repo", url=url)  # exist_ok=True reads the url
        self.hub._repos[repo.id] = repo
        repo.commits.append(_new_commit("initial commit", {".gitattributes": GITATTRIBUTES.encode()}))
        self.hub._changed("create", repo)
        return {"url": url}

    def _settings(self, repo: Repo, asked: dict[str, Any]) -> dict[str, Any]:
        repo.gated = asked.get("gated", repo.gated)
        repo.private = asked.get("private", repo.private)
        if "visibility" in asked:
            repo.private = asked["visibility"] == "private"
        self.hub._changed("settings", repo)
        return {"private": repo.private, "gated": repo.gated}

    def _info(self, repo: Repo, revision: str) -> dict[str, Any]:
        commit = _at(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        state = {"sha": commit.oid, "private": repo.private, "gated": repo.gated}
        return {"id": repo.id, "author": repo.id.split("/")[0], "tags": [], "siblings": siblings} | state

    def _lfs_batch(self, repo: Repo, asked: list[dict[str, Any]]) -> dict[str, Any]:
        objects: list[dict[str, Any]] = [{"oid": item["oid"], "size": item["size"]} for item in asked]
        for item in objects:
            if item["oid"] not in repo.objects:  # without actions, the client uploads nothing
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{repo.id}/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def _commit(self, repo: Repo, revision: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        head = _at(repo, revision)
        message, files, lfs = "", dict(head.files), set(head.lfs)
        for line in lines:
            value, path = line["value"], line["value"].get("path", "")
            match line["key"]:
                case "header":
                    message = value["summary"]
                    if value.get("parentCommit", head.oid) != head.oid:
                        raise _Refusal(412, "The parent commit is not the head")
                case "file":
                    files[path] = base64.b64decode(value["content"])
                    lfs.discard(path)
                case "lfsFile":
                    if value["oid"] not in repo.objects:
                        raise _Refusal(400, f"The LFS object of {path} was not uploaded")
                    files[path] = repo.objects[value["oid"]]
                    lfs.add(path)
        repo.commits.append(_new_commit(message, files, frozenset(lfs & files.keys())))
        self.hub._changed("commit", repo)
        oid = repo.commits[-1].oid
        return {"commitUrl": f"{self.hub.url}/{repo.id}/commit/{oid}", "commitOid": oid}

    def _resolve(self, repo: Repo, revision: str, path: str) -> bytes:
        if repo.gated and self._credentials()[0] != repo.id.split("/")[0]:
            raise _Refusal(403, f"Access to model {repo.id} is restricted", "GatedRepo")
        commit = _at(repo, revision)
        self.reply_headers["X-Repo-Commit"] = commit.oid
        if path not in commit.files:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        self.reply_headers["ETag"] = f'"{commit.content_id(path)}"'
        if path in commit.lfs:
            self.reply_headers["X-Linked-ETag"] = self.reply_headers["ETag"]
            self.reply_headers["X-Linked-Size"] = str(len(commit.files[path]))
        return commit.files[path]


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _new_commit(message: str, files: dict[str, bytes], lfs: frozenset[str] = frozenset()) -> Commit:
    # The id is random: a repo deleted and made again must not answer with ids that a client has cached.
    return Commit(secrets.token_hex(20), message, files, lfs)


def _at(repo: Repo, revision: str) -> Commit:
    for commit in reversed(repo.commits):
        if revision in ("main", commit.oid):
            return commit
    raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def _tree(entries: dict[str, dict[str, Any]], folder: str, recursive: bool) -> list[dict[str, Any]]:
    inside = [path for path in entries if path.startswith(folder)]
    if folder and not inside:
        raise _Refusal(404, f"{folder} does not exist", "EntryNotFound")
    return [entries[path] for path in inside if recursive or "/" not in path.removeprefix(folder)]


def _upload_mode(head: Commit, path: str, size: int) -> dict[str, Any]:
    is_lfs = size > 10 * 2**20 or any(fnmatch(path, pattern) for pattern in LFS_PATTERNS)
    oid = head.content_id(path) if path in head.files else None
    return {"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False, "oid": oid}
