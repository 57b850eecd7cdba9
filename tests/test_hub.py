"""Publishing: the record beside the weights, the card, gated repositories, pushes that fail."""

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
import yaml
from fake_hub import Commit, FakeHub
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from models import QUIET, layout, tiny_model, token_examples, trainer_of, trl_trainer_of
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.utils.hub import PushInProgress

from hf_poprisk import load_record
from hf_poprisk.checkpoints import damage
from hf_poprisk.hub import HubError
from hf_poprisk.record import CONFIG_NAME, STATISTICS_NAME, write_json

OPTIONS: dict[str, Any] = {
    **QUIET,
    **layout(2, 4),
    "max_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "push_to_hub": True,
    "hub_always_push": True,
}
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
SECTION = "## Population-risk gate"
STEP = "Training in progress, step "


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    hub, cache = FakeHub(), tmp_path / "cache"
    cache.mkdir()
    with hub.running(cache):
        yield hub


class OnePushAtATime(TrainerCallback):
    """Makes the files of each commit those of its step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.push_in_progress is not None:
            self.trainer.push_in_progress.wait_until_done()


@pytest.fixture
def build(hub: FakeHub, llama_dir: Path) -> Callable[..., Any]:
    """A trainer of a model, or of an adapter."""

    def build(folder: Path, kind: str = "causal", **options: Any) -> Any:
        options = {**OPTIONS, "hub_model_id": f"alice/{folder.name}", **options}
        if kind == "causal":
            trainer = trainer_of(folder, **options)
        else:
            adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
            trainer = trl_trainer_of("DPO", str(llama_dir), folder, peft_config=adapter, **options)
        trainer.add_callback(OnePushAtATime(trainer))
        return trainer

    return build


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


def check_out(commit: Commit, folder: Path) -> Path:
    for name, content in commit.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def logits(model: Any) -> torch.Tensor:
    model.set_attn_implementation("eager")  # a loaded model would have another one
    batch = token_examples(1)[0]
    with torch.no_grad():
        return model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def load(folder: Path, base: Path | None) -> torch.Tensor:
    """The logits of a model, or of an adapter on its base."""
    model = AutoModelForCausalLM.from_pretrained(base or folder)
    return logits(model if base is None else PeftModel.from_pretrained(model, folder))


def card(commit: Commit) -> tuple[dict[str, Any], str]:
    return parse_card(commit.files["README.md"].decode())


def parse_card(text: str) -> tuple[dict[str, Any], str]:
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


def assert_one_sentence(message: str, *contains: str) -> None:
    assert all(part in message for part in contains), message
    without_reason = re.sub(r"\(.*?\)[;:]", "", message)
    assert "\n" not in message and message.endswith(".") and ". " not in without_reason, message


# Folders of weights → their step, after each commit; last of all the push at the end.
COMMITS: dict[str, list[tuple[str, dict[str, int]]]] = {
    "end": [("End of training", {".": 2})],
    "every_save": [("1", {".": 1}), ("2", {".": 2})],
    "checkpoint": [
        ("1", {".": 1}),
        ("1, checkpoint", {".": 1, "last-checkpoint": 1}),
        ("2", {".": 2, "last-checkpoint": 1}),
        ("2, checkpoint", {".": 2, "last-checkpoint": 2}),
    ],
    "all_checkpoints": [
        ("1", {".": 1}),
        ("1, checkpoint", {".": 1, "checkpoint-1": 1}),
        ("2", {".": 2, "checkpoint-1": 1}),
        ("2, checkpoint", {".": 2, "checkpoint-1": 1, "checkpoint-2": 2}),
    ],
}


@pytest.mark.parametrize("kind", ["causal", "adapter"])
@pytest.mark.parametrize("strategy", COMMITS)
def test_every_commit_has_the_record_beside_its_weights_and_the_last_the_card(
    kind: str, strategy: str, hub: FakeHub, build: Any, llama_dir: Path, tmp_path: Path
) -> None:
    """And who downloads them has the trained model."""
    trainer, name = build(tmp_path / "pushed", kind, hub_strategy=strategy), "alice/pushed"
    trainer.train()
    trainer.push_to_hub()
    first, *commits = hub.repos[name].commits
    assert not first.files.keys() & set(WEIGHTS)
    found = [(commit.message.removeprefix(STEP), steps_of(commit)) for commit in commits]
    expected = COMMITS[strategy]
    assert found[: len(expected)] == expected and found[-1][1] == expected[-1][1]
    assert {message for message, _ in found[len(expected) :]} <= {"End of training"}
    record = load_record(name)
    assert record.config["steps"] == 2 and record.statistics["parameters"]
    if strategy != "end":
        assert load_record(name, revision=commits[0].oid).config["steps"] == 1
    trained, base = logits(trainer.model), None if kind == "causal" else llama_dir
    assert not torch.equal(logits(tiny_model()), trained)
    downloaded = check_out(commits[-1], tmp_path / "downloaded")
    for folder, steps in expected[-1][1].items():
        assert folder == "." or damage(downloaded / folder) is None
        assert steps < 2 or torch.equal(load(downloaded / folder, base), trained)
    metadata, body = card(commits[-1])
    assert body.count(SECTION) == 1 and "litman2026theory" in body and "arXiv:2605.01172" in body
    opened, live = (sum(e["sums"][k] for e in record.statistics["parameters"].values()) for k in (0, 1))
    assert f"| hard | example | 4 examples | 2 | {opened / live:.3f} | 0.391 |" in body
    assert "Training data: 8 examples." in body and "poprisk" in metadata["tags"]
    assert metadata["poprisk"]["gate"] == "hard" and metadata["poprisk"]["units_per_step"] == 4
    assert metadata["library_name"] == ("peft" if kind == "adapter" else "transformers")
    # the base of the adapter is a folder of this machine
    assert "base_model" not in metadata and str(llama_dir) not in commits[-1].files["README.md"].decode()
    trainer.push_to_hub()
    assert len(hub.repos[name].commits) == 1 + len(commits)  # nothing to change


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
    hub: FakeHub, build: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "written"
    folder.mkdir()
    (folder / "README.md").write_text(WRITTEN)
    trainer = build(folder, save_strategy="no")
    trainer.train()
    trainer.push_to_hub()
    trainer.push_to_hub()  # finds nothing to change
    assert len(hub.repos["alice/written"].commits) == 2
    metadata, body = card(hub.repos["alice/written"].commits[-1])
    assert metadata.pop("poprisk")["gate"] == "hard"
    assert metadata == parse_card(WRITTEN)[0] | {"tags": ["mine", "poprisk"]}
    assert body.startswith(parse_card(WRITTEN)[1]) and body.count(SECTION) == 1


def test_a_generated_card_is_renewed(hub: FakeHub, build: Any, tmp_path: Path) -> None:
    def run(**options: Any) -> str:
        trainer = build(tmp_path / "renewed", save_strategy="no", **options)
        trainer.train()
        trainer.push_to_hub()
        _, body = card(hub.repos["alice/renewed"].commits[-1])
        assert body.count(SECTION) == body.count("hf_poprisk:begin") == body.count("hf_poprisk:end") == 1
        return body

    assert "- learning_rate: 0.001\n" in run()
    second = run(learning_rate=0.002, poprisk_gate="soft")
    assert "- learning_rate: 0.002\n" in second and "- learning_rate: 0.001\n" not in second
    assert "| soft | example |" in second and "| hard | example |" not in second


@pytest.mark.parametrize(
    ("name", "before", "private", "options"),
    [
        ("alice/without-name", None, False, {"hub_model_id": None}),
        ("alice/manual", None, False, {"poprisk_hub_access": "manual", "hub_strategy": "checkpoint"}),
        ("bob/other-token", None, False, {"hub_token": "hf_bob"}),
        ("alice/asked-private", None, True, {"hub_private_repo": True}),
        ("alice/was-private", "private", True, {}),
        ("alice/was-public", "public", False, {}),
    ],
)
def test_nothing_of_a_gated_repository_is_ever_open(
    name: str, before: str | None, private: bool, options: Any, hub: FakeHub, build: Any, tmp_path: Path
) -> None:
    options = {"hub_model_id": name, "hub_strategy": "every_save", "poprisk_hub_access": "auto", **options}
    gated = options["poprisk_hub_access"]
    if before is not None:
        HfApi().create_repo(name, private=before == "private")
    trainer = build(tmp_path / name.split("/")[1], **options)
    trainer.train()
    repo = hub.repos[name]
    assert (repo.private, repo.gated) == (before != "public", gated)
    trainer.push_to_hub()
    assert (repo.private, repo.gated) == (private, gated)
    assert not repo.exposed and len(repo.commits) >= 3
    assert steps_of(repo.commits[-1])["."] == 2
    repo.private = True  # by its owner
    trainer.push_to_hub()
    assert repo.private and repo.gated == gated


@pytest.mark.parametrize(
    ("status", "options"),
    [
        (500, {"poprisk_hub_access": "manual"}),
        (403, {"hub_model_id": "bob/his", "poprisk_hub_access": "manual"}),
        (403, {"hub_model_id": "alice/base", "hub_token": "hf_bob"}),  # who may read it
    ],
)
def test_a_repository_that_cannot_be_had_is_told_before_training(
    status: int, options: dict[str, Any], hub: FakeHub, build: Any, tmp_path: Path
) -> None:
    HfApi().create_repo("alice/base")
    if status == 500:
        hub.faults["settings"] = 500
    with pytest.raises(HfHubHTTPError, match=str(status)):
        build(tmp_path, **options)
    assert all(len(repo.commits) == 1 for repo in hub.repos.values())


def local_steps(folder: Path) -> list[int]:
    """Of the checkpoints, all of them whole."""
    found = sorted(folder.glob("checkpoint-*"))
    assert [damage(path) for path in found] == [None] * len(found)
    return [load_record(path).config["steps"] for path in found]


@pytest.mark.parametrize(("fault", "steps"), [("upload", 1), ("commit", 3)])  # or others follow
def test_training_outlives_a_failed_push(
    fault: str, steps: int, hub: FakeHub, build: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "outlives"
    trainer = build(folder, max_steps=steps, hub_strategy="every_save")
    hub.faults[fault] = 403
    with caplog.at_level(logging.WARNING, "hf_poprisk.hub"):
        trainer.train()
        time.sleep(0.5)  # the last word is of the thread that pushed
    (warning,) = [r.message for r in caplog.records if r.name == "hf_poprisk.hub"]
    assert_one_sentence(warning, "alice/outlives", "403 Forbidden", "training goes on", str(folder))
    assert trainer.state.global_step == steps and local_steps(folder) == [*range(1, steps + 1)]
    pushed = [(commit.message, steps_of(commit)) for commit in hub.repos["alice/outlives"].commits[1:]]
    assert pushed == [(f"{STEP}{step}", {".": step}) for step in range(2, steps + 1)]


@pytest.mark.parametrize(("fault", "gated"), [("upload", "auto"), ("commit", False), ("settings", "auto")])
def test_a_final_push_that_fails_can_be_made_again(
    fault: str, gated: Any, hub: FakeHub, build: Any, tmp_path: Path
) -> None:
    folder, name = tmp_path / "final", "alice/final"
    trainer = build(folder, hub_strategy="end", poprisk_hub_access=gated or None)
    trainer.train()
    hub.faults[fault] = 500
    with pytest.raises(HubError) as caught:
        trainer.push_to_hub()
    said = f"the push to {name} failed ("
    assert_one_sentence(str(caught.value), said, str(folder), "push_to_hub() again")
    assert torch.equal(load(folder, None), logits(trainer.model))
    assert load_record(folder).config["steps"] == 2 and local_steps(folder) == [1, 2]
    repo = hub.repos[name]
    assert (repo.private, repo.gated) == (bool(gated), gated)
    trainer.push_to_hub()
    assert (repo.private, repo.gated) == (False, gated)
    assert steps_of(repo.commits[-1]) == {".": 2}
    assert not gated or not repo.exposed


def test_half_a_record_is_no_file_that_a_push_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: names.append(self.name) or replace(self, to))
    write_json(tmp_path / CONFIG_NAME, {})
    assert names and all(name.startswith("_") for name in names)  # transformers leaves out _*


def test_while_another_push_is_in_progress_the_record_stays_with_its_weights(
    hub: FakeHub, build: Any, tmp_path: Path
) -> None:
    trainer = build(tmp_path, hub_strategy="every_save", hub_always_push=False)
    trainer.push_in_progress = PushInProgress([Future()])
    trainer._push_from_checkpoint(str(tmp_path))
    assert not (tmp_path / CONFIG_NAME).is_file() and len(trainer.push_in_progress.jobs) == 1
