"""Publishing to a local Hub: the record beside the weights, the card, gating, pushes that fail."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any
from unittest import mock

import hub_client
import numpy as np
import pytest
import yaml
from hub_server import Commit, HubServer
from models import tiny_model
from transformers.training_args import HubStrategy
from transformers.utils.hub import PushInProgress

from hf_poprisk import load_record
from hf_poprisk.checkpoints import damage
from hf_poprisk.hub import HubError, HubMixin
from hf_poprisk.record import CONFIG_NAME, STATISTICS_NAME, write_json

Client = Callable[..., Any]  # runs a function of hub_client in the other process
Publish = Callable[[str, str], dict[str, Any]]
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
SECTION = "## Population-risk gate"
STEP = "Training in progress, step "


@contextmanager
def process(hub: HubServer, home: Path) -> Iterator[Client]:
    """A fresh process with a cold cache that runs functions of hub_client."""
    pool = ProcessPoolExecutor(1, get_context("spawn"))
    with mock.patch.dict(os.environ, hub.environment() | {"HF_HOME": str(home)}):
        pool.submit(hub_client.start)
    try:
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result(120)
    finally:
        pool.shutdown()


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _no_fault_outlives_its_test(hub: HubServer) -> Iterator[None]:
    yield
    hub._faults.clear()


@pytest.fixture(scope="module")
def clients(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Client]]:
    homes = [tmp_path_factory.mktemp(name) for name in ("writer", "reader")]
    with process(hub, homes[0]) as writer, process(hub, homes[1]) as reader:
        yield writer, reader


@pytest.fixture(scope="module")
def client(clients: tuple[Client, Client]) -> Client:
    return clients[0]


@pytest.fixture(scope="module")
def reader(clients: tuple[Client, Client]) -> Client:
    """Knows nothing but what it downloads."""
    return clients[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def base(hub: HubServer, client: Client, llama_dir: Path) -> str:
    """A base model that has a name on the Hub."""
    client(hub_client.upload, "alice/base", llama_dir)
    return "alice/base"


@pytest.fixture(scope="module")
def publish(client: Client, root: Path, llama_dir: Path) -> Publish:
    """Train with pushes and push at the end, once per kind and strategy."""

    @cache
    def publish(kind: str, strategy: str) -> dict[str, Any]:
        folder = root / f"{kind}-{strategy}"
        trained = client(
            hub_client.train, folder, kind, base=str(llama_dir), hub_strategy=strategy, eval_strategy="steps"
        )
        client(hub_client.push, folder)
        return trained

    return publish


def steps_of(commit: Commit) -> dict[str, int]:
    """Folder of weights → optimizer steps, by the record that lies beside them."""
    steps = {}
    for path in map(PurePosixPath, commit.files):
        if path.name in WEIGHTS:
            config, statistics = (
                json.loads(commit.files[str(path.parent / name)]) for name in (CONFIG_NAME, STATISTICS_NAME)
            )
            steps[str(path.parent)] = config["steps"]
            assert {entry["steps"] for entry in statistics["parameters"].values()} == {config["steps"]}
    return steps


def card(commit: Commit) -> tuple[dict[str, Any], str]:
    return parse_card(commit.files["README.md"].decode())


def parse_card(text: str) -> tuple[dict[str, Any], str]:
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


def assert_one_sentence(error: BaseException, *contains: str) -> None:
    message = str(error)
    assert all(part in message for part in contains), message
    without_reason = re.sub(r"\(.*?\)[;:]", "", message)
    assert "\n" not in message and message.endswith(".") and ". " not in without_reason, message


@pytest.mark.parametrize("kind", ["causal", "adapter"])
@pytest.mark.parametrize(
    ("strategy", "during_training", "last"),
    [
        ("end", [], {".": 2}),
        ("every_save", [("1", {".": 1}), ("2", {".": 2})], {".": 2}),
        (
            "checkpoint",
            [
                ("1", {".": 1}),
                ("1, checkpoint", {".": 1, "last-checkpoint": 1}),
                ("2", {".": 2, "last-checkpoint": 1}),
                ("2, checkpoint", {".": 2, "last-checkpoint": 2}),
            ],
            {".": 2, "last-checkpoint": 2},
        ),
        (
            "all_checkpoints",
            [
                ("1", {".": 1}),
                ("1, checkpoint", {".": 1, "checkpoint-1": 1}),
                ("2", {".": 2, "checkpoint-1": 1}),
                ("2, checkpoint", {".": 2, "checkpoint-1": 1, "checkpoint-2": 2}),
            ],
            {".": 2, "checkpoint-1": 1, "checkpoint-2": 2},
        ),
    ],
)
def test_every_commit_has_the_record_beside_its_weights(
    kind: str,
    strategy: str,
    during_training: list[tuple[str, dict[str, int]]],
    last: dict[str, int],
    hub: HubServer,
    reader: Client,
    publish: Publish,
    llama_dir: Path,
) -> None:
    """And who downloads them has the trained model."""
    trained, name = publish(kind, strategy), f"alice/{kind}-{strategy}"
    first, *commits = hub.repo(name).commits
    assert not first.files.keys() & set(WEIGHTS)
    found = [(commit.message.removeprefix(STEP), steps_of(commit)) for commit in commits]
    assert found[: len(during_training)] == during_training and found[-1][1] == last
    assert {message for message, _ in found[len(during_training) :]} <= {"End of training"}
    record = reader(hub_client.record, name)
    assert record.config["steps"] == trained["steps"] == 2 and record.statistics["parameters"]
    base = None if kind == "causal" else llama_dir
    assert not np.array_equal(hub_client.logits(tiny_model()), trained["logits"])
    assert np.array_equal(reader(hub_client.load, name, base), trained["logits"])
    for folder, steps in last.items():
        if folder != ".":
            assert damage(reader(hub_client.snapshot, name) / folder) is None
        if folder != "." and steps == 2:
            assert np.array_equal(reader(hub_client.load, name, base, folder), trained["logits"])


@pytest.mark.parametrize("kind", ["causal", "adapter"])
def test_the_card_says_how_the_model_was_trained(
    kind: str, hub: HubServer, publish: Publish, llama_dir: Path
) -> None:
    publish(kind, "checkpoint")
    commit = hub.repo(f"alice/{kind}-checkpoint").commits[-1]
    metadata, body = card(commit)
    assert body.count(SECTION) == 1 and "litman2026theory" in body and "arXiv:2605.01172" in body
    parameters = json.loads(commit.files[STATISTICS_NAME])["parameters"].values()
    opened, live = (sum(entry["sums"][k] for entry in parameters) for k in (0, 1))
    assert f"| hard | example | 4 examples | 2 | {opened / live:.3f} | 0.391 |" in body
    assert "Training data: 8 examples." in body
    assert "poprisk" in metadata["tags"]
    assert metadata["poprisk"]["gate"] == "hard" and metadata["poprisk"]["units_per_step"] == 4
    assert "base_model" not in metadata  # of the adapter, it is a folder of this machine
    assert str(llama_dir) not in commit.files["README.md"].decode()
    assert metadata.get("library_name") == ("peft" if kind == "adapter" else "transformers")


@pytest.mark.parametrize("written", [False, True])
def test_the_card_of_an_adapter_names_its_base(
    written: bool, hub: HubServer, client: Client, reader: Client, root: Path, base: str
) -> None:
    folder = root / f"of-base-{written}"
    folder.mkdir()
    if written:
        (folder / "README.md").write_text("My own words.\n")
    trained = client(hub_client.train, folder, "adapter", base=base, save_strategy="no")
    client(hub_client.push, folder)
    metadata, _ = card(hub.repo(f"alice/{folder.name}").commits[-1])
    assert metadata["base_model"] == base and metadata["library_name"] == "peft"
    assert np.array_equal(reader(hub_client.load, f"alice/{folder.name}", base), trained["logits"])


WRITTEN = """\
---
license: mit
base_model: alice/base
datasets: [alice/pairs]
tags: [mine]
---
# My model

My own words.

## My section
"""


def test_a_card_that_somebody_wrote_keeps_its_text_and_metadata(
    hub: HubServer, client: Client, root: Path
) -> None:
    folder = root / "written"
    folder.mkdir()
    (folder / "README.md").write_text(WRITTEN)
    client(hub_client.train, folder, save_strategy="no")
    client(hub_client.push, folder)
    client(hub_client.push, folder)  # finds nothing to change
    assert len(hub.repo("alice/written").commits) == 2
    metadata, body = card(hub.repo("alice/written").commits[-1])
    assert metadata.pop("poprisk")["gate"] == "hard"
    assert metadata == parse_card(WRITTEN)[0] | {"tags": ["mine", "poprisk"]}
    assert body.startswith(parse_card(WRITTEN)[1]) and body.count(SECTION) == 1


def test_a_generated_card_is_renewed(hub: HubServer, client: Client, root: Path) -> None:
    folder = root / "renewed"

    def run(**options: Any) -> str:
        client(hub_client.train, folder, save_strategy="no", **options)
        client(hub_client.push, folder)
        _, body = card(hub.repo("alice/renewed").commits[-1])
        assert body.count(SECTION) == body.count("hf_poprisk:begin") == body.count("hf_poprisk:end") == 1
        return body

    assert "- learning_rate: 0.001\n" in run()
    commits = len(hub.repo("alice/renewed").commits)
    client(hub_client.push, folder)
    assert len(hub.repo("alice/renewed").commits) == commits  # the second push found nothing to change
    second = run(learning_rate=0.002, poprisk_gate="soft")
    assert "- learning_rate: 0.002\n" in second and "- learning_rate: 0.001\n" not in second
    assert "| soft | example |" in second and "| hard | example |" not in second


def test_the_record_of_a_repository(hub: HubServer, reader: Client, publish: Publish, base: str) -> None:
    publish("causal", "every_save")
    name = "alice/causal-every_save"
    first = hub.repo(name).commits[1]
    assert reader(hub_client.record, name, revision=first.oid).config["steps"] == 1
    with pytest.raises(FileNotFoundError, match=f"{base} has no {CONFIG_NAME}"):
        reader(hub_client.record, base)


@pytest.mark.parametrize(
    ("name", "gated", "before", "private", "options"),
    [
        ("alice/auto", "auto", None, False, {}),
        ("alice/manual", "manual", None, False, {"kind": "adapter", "hub_strategy": "checkpoint"}),
        ("alice/without-name", "auto", None, False, {"hub_model_id": None}),
        ("bob/other-token", "manual", None, False, {"hub_token": "hf_stranger"}),
        ("alice/asked-private", "auto", None, True, {"hub_private_repo": True}),
        ("alice/was-private", "manual", "private", True, {}),
        ("alice/was-public", "auto", "public", False, {}),
    ],
)
def test_nothing_of_a_gated_repository_is_ever_open(
    name: str,
    gated: str,
    before: str | None,
    private: bool,
    options: dict[str, Any],
    hub: HubServer,
    client: Client,
    root: Path,
    llama_dir: Path,
) -> None:
    folder = root / name.split("/")[1]
    if before is not None:
        client(hub_client.create_repo, name, private=before == "private")
    options = {"hub_model_id": name, "hub_strategy": "every_save", **options}
    client(hub_client.train, folder, base=str(llama_dir), poprisk_hub_access=gated, **options)
    repo = hub.repo(name)
    assert (repo.private, repo.gated) == (before != "public", gated)
    client(hub_client.push, folder)
    assert (repo.private, repo.gated) == (private, gated)
    events = [event for event in hub.log if event.repo == name]
    assert not any(event.exposed for event in events)
    assert sum(event.kind == "commit" for event in events) >= 3
    assert steps_of(repo.commits[-1])["."] == 2
    repo.private = True  # by its owner
    client(hub_client.push, folder)
    assert repo.private and repo.gated == gated


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        (("create", 500), {}),
        (("create", 500), {"poprisk_hub_access": "auto"}),
        (("settings", 500), {"poprisk_hub_access": "manual"}),
        (None, {"hub_token": "hf_reader"}),
        (None, {"hub_model_id": "bob/his", "poprisk_hub_access": "manual"}),
        (None, {"hub_model_id": "alice/base", "hub_token": "hf_stranger"}),  # which may read it
    ],
    ids=str,
)
def test_a_repository_that_cannot_be_had_is_told_before_training(
    fault: tuple[str, int] | None,
    options: dict[str, Any],
    hub: HubServer,
    client: Client,
    base: str,
    tmp_path: Path,
) -> None:
    if fault is not None:
        hub.fail(*fault)
    changes = len(hub.log)
    with pytest.raises(HubError) as caught:
        client(hub_client.construct, tmp_path, **options)
    name = options.get("hub_model_id", f"alice/{tmp_path.name}")
    assert_one_sentence(
        caught.value, f"the repository {name} could not be made ready on the Hub (", "hub_token"
    )
    assert not any(event.exposed or event.kind == "commit" for event in hub.log[changes:])


def local_checkpoints(folder: Path) -> list[str]:
    """The whole ones."""
    found = sorted(folder.glob("checkpoint-*"))
    assert [damage(path) for path in found] == [None] * len(found)
    assert [load_record(path).config["steps"] for path in found] == list(range(1, len(found) + 1))
    return [path.name for path in found]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (("preupload", 403), "403 Forbidden"),
        (("upload", 403), "403 Forbidden"),
        (("commit", 500), "500 Internal Server Error"),
    ],
    ids=str,
)
def test_training_outlives_a_failed_push(
    fault: tuple[Any, ...], reason: str, hub: HubServer, client: Client, root: Path
) -> None:
    folder = root / "-".join(map(str, ("outlives", *fault)))
    hub.fail(*fault)
    trained = client(hub_client.train, folder, max_steps=3, hub_strategy="every_save")
    assert trained["steps"] == 3
    (warning,) = trained["warnings"]
    assert_one_sentence(Warning(warning), f"alice/{folder.name}", reason, "training goes on", str(folder))
    assert local_checkpoints(folder) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    pushed = [(commit.message, steps_of(commit)) for commit in hub.repo(f"alice/{folder.name}").commits[1:]]
    assert pushed == [(f"{STEP}2", {".": 2}), (f"{STEP}3", {".": 3})]


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        (("upload", 403), {"poprisk_hub_access": "auto"}),
        (("commit", 501), {"kind": "adapter", "poprisk_hub_access": "manual"}),
        (("commit", 500), {}),
        (("settings", 500), {"poprisk_hub_access": "auto"}),
    ],
    ids=str,
)
def test_a_final_push_that_fails_can_be_made_again(
    fault: tuple[Any, ...],
    options: dict[str, Any],
    hub: HubServer,
    client: Client,
    reader: Client,
    root: Path,
    llama_dir: Path,
) -> None:
    folder = root / "-".join(map(str, ("final", *fault)))
    name = f"alice/{folder.name}"
    trained = client(hub_client.train, folder, base=str(llama_dir), hub_strategy="end", **options)
    hub.fail(*fault)
    with pytest.raises(HubError) as caught:
        client(hub_client.push, folder)
    assert_one_sentence(caught.value, f"the push to {name} failed (", str(folder), "push_to_hub() again")
    adapter_base = llama_dir if "kind" in options else None
    assert np.array_equal(hub_client.load(folder, adapter_base), trained["logits"])
    assert load_record(folder).config["steps"] == 2 and len(local_checkpoints(folder)) == 2
    gated = options.get("poprisk_hub_access", False)
    assert (hub.repo(name).private, hub.repo(name).gated) == (bool(gated), gated)
    client(hub_client.push, folder)
    repo = hub.repo(name)
    assert (repo.private, repo.gated) == (False, gated)
    assert steps_of(repo.commits[-1]) == {".": 2}
    assert not gated or not any(event.exposed for event in hub.log if event.repo == name)
    assert np.array_equal(reader(hub_client.load, name, adapter_base), trained["logits"])


def test_no_folder_of_this_machine_is_named(
    hub: HubServer, client: Client, root: Path, llama_dir: Path
) -> None:
    folder = root / "no-folder"
    client(hub_client.train, folder, "adapter", base=str(llama_dir), save_strategy="no")
    for _ in range(2):
        client(hub_client.push, folder)
        text = hub.repo("alice/no-folder").commits[-1].files["README.md"].decode()
        assert str(llama_dir) not in text
    assert len(hub.repo("alice/no-folder").commits) == 2  # the second found nothing to change


def test_a_push_before_training(hub: HubServer, client: Client, tmp_path: Path) -> None:
    client(hub_client.construct, tmp_path)
    client(hub_client.push, tmp_path)
    assert "model.safetensors" in hub.repo(f"alice/{tmp_path.name}").commits[-1].files


def test_half_a_record_is_no_file_that_a_push_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: names.append(self.name) or replace(self, to))
    write_json(tmp_path / CONFIG_NAME, {})
    assert names and all(name.startswith("_") for name in names)  # transformers leaves out _*


class Stock:
    """Of transformers' trainer, what pushes during training touch."""

    def __init__(self, folder: Path, always: bool, push: PushInProgress) -> None:
        self.args = SimpleNamespace(
            hub_always_push=always, hub_strategy=HubStrategy.EVERY_SAVE, output_dir=str(folder)
        )
        self.push_in_progress, self.hub_model_id, self.written = push, "alice/x", False

    def is_world_process_zero(self) -> bool:
        return True

    def _write_record(self, folder: str) -> None:
        self.written = True

    def _push_from_checkpoint(self, folder: str) -> None:
        if not self.args.hub_always_push and not self.push_in_progress.is_done():
            return
        for job in self.push_in_progress.jobs:
            job.set_exception(OSError("broken"))
        self.push_in_progress = PushInProgress([])


class Pushing(HubMixin, Stock):
    pass


def test_the_record_stays_with_its_weights_when_a_push_is_left_out(tmp_path: Path) -> None:
    trainer = Pushing(tmp_path, False, PushInProgress([Future()]))
    trainer._push_from_checkpoint("")
    assert not trainer.written


def test_a_push_that_fails_while_the_next_begins_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Pushing(tmp_path, True, PushInProgress([Future()]))
    with caplog.at_level(logging.WARNING):
        trainer._push_from_checkpoint("")
    assert "broken" in caplog.text
