"""A small Hugging Face Hub in memory, in the place of the requests that ``HfApi`` makes.

There are repositories of models and data sets, with one branch. Owners see and change what is theirs, and
nobody else gets into a private one. Which files a push takes, and in which thread, is decided by
huggingface_hub itself.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
import yaml
from huggingface_hub import CommitInfo, HfApi, RepoUrl, constants
from huggingface_hub.errors import HfHubHTTPError

USERS = {"hf_alice": "alice", "hf_bob": "bob"}  # by token


class Commit(NamedTuple):
    """The whole repository after it."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    type: str | None = None
    gated: str | bool = False
    commits: list[Commit] = field(default_factory=list)
    exposed: set[str] = field(default_factory=set)  # files that anybody could have downloaded at some time

    def changed(self) -> None:
        if not self.private and not self.gated:  # old commits stay reachable
            self.exposed |= {path for commit in self.commits for path in commit.files}


def refusal(status: int) -> HfHubHTTPError:
    response = httpx2.Response(status, request=httpx2.Request("POST", constants.ENDPOINT))
    return HfHubHTTPError(f"{status} {response.reason_phrase}\nfor a request", response=response)


class FakeHub:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, int] = {}  # what fails once, with which status

    @contextmanager
    def running(self, cache: Path) -> Iterator[None]:
        """huggingface_hub talks to it, as alice unless there is a token."""

        def method(fake: Any) -> Any:
            def call(api: HfApi, *args: Any, token: str | None = None, **kwargs: Any) -> Any:
                return fake(USERS[token or api.token or "hf_alice"], *args, **kwargs)

            return call

        def download(name: str, revision: str | None, token: str | None, allow_patterns: list[str]) -> str:
            return str(self._download(cache, USERS[token or "hf_alice"], name, revision, allow_patterns))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # one request per commit
            patch.setattr("hf_poprisk.record.snapshot_download", download)
            calls = ("create_repo", "update_repo_settings", "auth_check", "_validate_yaml", "create_commit")
            for name in calls:
                patch.setattr(HfApi, name, method(getattr(self, name)))
            yield

    def _fail(self, what: str) -> None:
        if what in self.faults:
            raise refusal(self.faults.pop(what))

    def _repo(self, user: str, repo_id: str, write: bool = True) -> Repo:
        found = self.repos.get(repo_id)
        mine = repo_id.startswith(f"{user}/")
        if found is None or found.private and not mine:
            raise refusal(404)
        if write and not mine:
            raise refusal(403)
        return found

    def create_repo(
        self,
        user: str,
        repo_id: str,
        private: bool | None = None,
        exist_ok: bool = False,
        repo_type: str | None = None,
    ) -> RepoUrl:
        name = repo_id if "/" in repo_id else f"{user}/{repo_id}"
        if name not in self.repos:
            if not name.startswith(f"{user}/"):
                raise refusal(403)
            self.repos[name] = Repo(bool(private), repo_type, commits=[Commit("0", "", {})])
        elif not exist_ok:
            raise refusal(409)
        return RepoUrl(f"{constants.ENDPOINT}/{'datasets/' * (repo_type == 'dataset')}{name}")

    def update_repo_settings(
        self, user: str, repo_id: str, gated: str | None = None, private: bool | None = None
    ) -> None:
        self._fail("settings")
        repo = self._repo(user, repo_id)
        repo.gated = repo.gated if gated is None else gated
        repo.private = repo.private if private is None else private
        repo.changed()

    def auth_check(self, user: str, repo_id: str, write: bool = False, repo_type: str | None = None) -> None:
        if self._repo(user, repo_id, write).type != repo_type:
            raise refusal(404)

    def _validate_yaml(self, user: str, content: str, repo_type: str | None = None) -> None:
        yaml.safe_load(content.split("---")[1])

    def create_commit(
        self,
        user: str,
        repo_id: str,
        operations: list[Any],
        commit_message: str,
        repo_type: str | None = None,
        **others: Any,
    ) -> CommitInfo:
        repo = self._repo(user, repo_id)
        if repo.type != repo_type:
            raise refusal(404)
        try:
            self._fail("upload")
        except HfHubHTTPError as error:  # as huggingface_hub says it
            raise RuntimeError("Error while uploading 'model.safetensors' to the Hub.") from error
        self._fail("commit")
        files = dict(repo.commits[-1].files)
        for operation in operations:
            with operation.as_file() as file:
                files[operation.path_in_repo] = file.read()
        if files != repo.commits[-1].files:  # it makes no empty commits
            named = json.dumps(sorted((path, hashlib.sha1(data).hexdigest()) for path, data in files.items()))
            repo.commits.append(Commit(hashlib.sha1(named.encode()).hexdigest(), commit_message, files))
            repo.changed()
        url = f"{constants.ENDPOINT}/{repo_id}/commit/{repo.commits[-1].oid}"
        return CommitInfo(commit_url=url, commit_message=commit_message, commit_description="", oid=url[-40:])

    def _download(self, cache: Path, user: str, name: str, revision: str | None, patterns: list[str]) -> Path:
        commits = {commit.oid: commit for commit in self._repo(user, name, write=False).commits}
        commit = commits[revision or list(commits)[-1]]
        folder = cache / commit.oid
        folder.mkdir(exist_ok=True)
        for path, content in commit.files.items():
            if any(fnmatch(path, pattern) for pattern in patterns):
                (folder / path).write_bytes(content)
        return folder
