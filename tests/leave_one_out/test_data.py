"""The training data of a run: found, checked, and as text."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_poprisk.leave_one_out import INDEX
from hf_poprisk.leave_one_out.data import example_text, find_rows, known_flips, load_data, whole_text
from hf_poprisk.leave_one_out.index import take_sample
from hf_poprisk.leave_one_out.table import load_run
from hf_poprisk.user_errors import UserError, shorten
from leave_one_out.helpers import learnable
from leave_one_out.judged import WRONG, N, command, log_odds, message, pairs, refused, save_run


def test_splits_of_folders(run: Path, tmp_path: Path, capsys: Any) -> None:
    """Of data files, and of ``save_to_disk``."""
    files, saved = tmp_path / "files", tmp_path / "dict"
    files.mkdir()
    plain = pairs(flips=False)
    few = plain.select(range(9))
    plain.to_parquet(files / "train.parquet")
    few.to_parquet(files / "test.parquet")
    DatasetDict({"train": few, "kept": pairs()}).save_to_disk(saved)
    out = command(capsys, run, "--dataset", files)
    assert f"good {int(np.argmin(log_odds()))}" in out and "is_flipped" not in out
    assert "AUROC" in command(capsys, run, "--dataset", saved, "--split", "kept")
    for options, says in (
        ([files, "--split", "test"], "the data have 9 rows"),
        ([files, "--split", "nowhere"], "nowhere"),
        ([files, "--config_name", "other"], "other"),
        ([saved], "the data have 9 rows"),
        ([saved, "--split", "test"], "has no split test: it has train, kept."),
    ):
        assert says in refused(capsys, run, "--dataset", *options)


def test_examples_are_found_by_their_index(tmp_path: Path, capsys: Any) -> None:
    ids = np.random.default_rng(5).permutation(1000)[:N] - 100
    run = save_run(tmp_path / "run", ids=ids)
    order = np.random.default_rng(6).permutation(N)
    # another order, and a row that was not trained on
    data = pairs().add_column(INDEX, ids).select(order)
    more = data.select([0]).remove_columns(INDEX).add_column(INDEX, np.array([5000]))
    data = datasets.concatenate_datasets([more, data])
    data.save_to_disk(tmp_path / "data")
    rows = find_rows(data, load_run(run))
    assert np.array_equal(np.asarray(data[INDEX])[rows], ids)
    out = command(capsys, run, "--dataset", tmp_path / "data")
    worst = int(np.argmin(log_odds()))
    assert f"good {worst}\n" in out and f"\n  {ids[worst]}, correct" in out
    assert "1 rows of the data are not in the run" in out
    assert np.array_equal(known_flips(data, rows), WRONG)


def test_data_of_another_run_are_refused(run: Path, tmp_path: Path, capsys: Any) -> None:
    def sentence(data: Dataset, name: str) -> str:
        data.save_to_disk(tmp_path / name)
        return refused(capsys, run, "--dataset", tmp_path / name)

    assert "the data have 50 rows and the run 60 examples" in sentence(pairs().select(range(50)), "few")
    more = datasets.concatenate_datasets([pairs(), pairs()])
    assert "the data have 120 rows and the run 60 examples" in sentence(more, "many")
    ids = np.arange(N)
    assert "example_index 59 is not in the data" in sentence(pairs().add_column(INDEX, ids - 1), "moved")
    with pytest.raises(UserError, match="the data have 0 rows"):
        find_rows(pairs().select([]), load_run(run))
    assert "must hold integers, each once" in sentence(pairs().add_column(INDEX, ids // 2), "twice")
    assert "must hold integers" in sentence(pairs().add_column(INDEX, ids / 2), "halves")
    missing = pairs(flips=False).add_column("is_flipped", [None, *[True] * (N - 1)])
    assert "is_flipped of the data has missing values" in sentence(missing, "missing")
    pairs(flips=False).add_column("is_flipped", WRONG.astype(int)).save_to_disk(tmp_path / "integers")
    assert "AUROC" not in command(capsys, run, "--dataset", tmp_path / "integers")  # is no truth


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv"])
def test_single_files(suffix: str, tmp_path: Path) -> None:
    path, rows = tmp_path / f"pairs.{suffix}", learnable()
    {"parquet": rows.to_parquet, "csv": rows.to_csv}.get(suffix, rows.to_json)(path)
    if suffix == "json":
        path.write_text(json.dumps(rows.to_list()))
    assert load_data(str(path)).to_dict() == rows.to_dict()
    assert load_data(str(path), "train[:7]").to_dict() == rows.select(range(7)).to_dict()


def test_unreadable_data_are_refused(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sentence(name: Any, split: str | None = None, config: str | None = None) -> str:
        with pytest.raises(UserError) as caught:
            load_data(str(name), split, config)
        return str(caught.value)

    file, broken = tmp_path / "rows.parquet", tmp_path / "broken"
    pairs().to_parquet(file)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "broken.jsonl").write_text('{"chosen": ')
    (tmp_path / "empty.jsonl").write_text("")
    broken.mkdir()
    for wrong in (tmp_path / "nowhere", "./nowhere", "a/b/c"):
        assert sentence(wrong) == f"--dataset {wrong} is not a folder."
    assert sentence("typo.jsonl") == "--dataset typo.jsonl is not there."
    assert ".parquet, .jsonl, .json, .csv" in sentence(tmp_path / "notes.txt")
    assert "--dataset typo is no folder here, and cannot be read" in sentence("typo")
    assert sentence(tmp_path / "empty.jsonl").endswith("empty.jsonl is empty.")
    assert "is a single file" in sentence(file, config="x")
    assert "cannot be read" in sentence(file, "test")
    for unreadable in (tmp_path / "broken.jsonl", broken):
        assert f"{unreadable.name} cannot be read" in sentence(unreadable)
    (broken / "train.parquet").write_bytes(file.read_bytes()[:200])
    assert "broken cannot be read" in sentence(broken)
    assert "--split has no effect" in sentence(saved, "train")
    assert "--config_name has no effect" in sentence(saved, config="train")
    next(saved.glob("*.arrow")).write_bytes(b"no table")
    assert "data cannot be read" in sentence(saved)
    stream = pairs().to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
    assert "is no table of examples but a stream" in sentence("user/stream")


def test_rows_in_another_order_are_refused(tmp_path: Path, saved: Path, capsys: Any) -> None:
    sample = take_sample(pairs(), np.arange(N))
    assert len(sample) == N and set(sample["0"]) == set(pairs().column_names)
    run = save_run(tmp_path / "run", sample=sample)
    assert "Noise rate: 25" in command(capsys, run, "--dataset", saved)
    pairs().shuffle(seed=1).save_to_disk(str(tmp_path / "shuffled"))
    says = refused(
        capsys, run, "--dataset", tmp_path / "shuffled", "--write", "filtered", "--to", tmp_path / "to"
    )
    assert "the data are not those of the run: 'prompt' of the row with example_index 0" in says
    assert not (tmp_path / "to").exists()
    more = pairs().remove_columns("prompt").add_column("mine", [1] * N)  # others are passed over
    more.save_to_disk(str(tmp_path / "more"))
    assert "Noise rate: 25" in command(capsys, run, "--dataset", tmp_path / "more")
    moved = pairs().add_column("example_index", np.arange(N)).shuffle(seed=1)  # known by their index
    moved.save_to_disk(str(tmp_path / "moved"))
    assert "Noise rate: 25" in command(capsys, run, "--dataset", tmp_path / "moved")


def test_data_from_before_the_labels_were_altered_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run, data = load_run(save_run(folder)), pairs(flips=False)
    find_rows(data, run)  # no record, nothing to say
    record = {"data": {"examples": N, "altered_labels": 15}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "hf_poprisk.leave_one_out.data.load_record", lambda folder: SimpleNamespace(config=record)
        )
        (folder / "poprisk_config.json").write_text("{}")
        with pytest.raises(UserError, match="15 labels of the run had been altered on purpose"):
            find_rows(data, run)
        find_rows(data.add_column("is_flipped", WRONG), run)
        record["data"]["altered_labels"] = None
        find_rows(data, run)


def test_conversations_are_shown_by_their_content() -> None:
    question, good = message("user", "Why?"), message("assistant", "Because.")
    bad, parts = message("assistant", "No."), [{"type": "image"}, {"type": "text", "text": "Look"}]
    expected = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    whole = {"chosen": [question, good], "rejected": [question, bad]}
    apart = {"prompt": [question], "chosen": [good], "rejected": [bad]}
    for example in (whole, {"prompt": "Why?", **whole}, apart):
        assert example_text(example, {}) == expected
    shown = example_text({"prompt": [message("user", parts)], "chosen": [good], "rejected": [good]}, {})
    assert shown == {"prompt": "image / Look", "chosen": "Because.", "rejected": "Because."}
    conversation = {"chosen": [message("user", "a\nb")], "rejected": None, "prompt": None}
    assert whole_text(conversation, {}, 2000) == {"chosen": "a\nb", "rejected": None}


def test_a_long_common_beginning_does_not_hide_the_difference() -> None:
    start = "word " * 100
    example = {"chosen": start + "good", "rejected": start + "gold"}
    assert whole_text(example, {}, 2000) == example
    assert whole_text(example, {}, 900) == {"prompt": start, "chosen": "… good", "rejected": "… gold"}
    shown = example_text(example, {})
    assert shown["prompt"].startswith("word word") and len(shown["prompt"]) <= 160
    same = example_text({"chosen": start, "rejected": start}, {})
    assert same["chosen"] == same["rejected"] != "… "


def test_labels_are_named() -> None:
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    assert example_text({"sentence": "a", "label": 1}, features) == {"sentence": "a", "label": "good"}
    assert example_text({"sentence": "a", "label": -1}, features)["label"] == "-1"
    plain = {"idx": 1, "text": "a", "other": "b", "labels": 3}
    assert example_text(plain, {**features, "labels": Value("int64")}) == {"text": "a", "labels": "3"}
    unusual = {"idx": 1, "premise": "a", "hypothesis": "b"}
    assert example_text(unusual, {}) == {"premise": "a", "hypothesis": "b"}


def test_text_is_shortened_and_cannot_steer_the_terminal() -> None:
    assert shorten("a\n\n b\t\x1b[31mred", 160) == "a b [31mred"
    assert shorten("x" * 400, 160) == "x" * 158 + " …" and shorten("x" * 160, 160) == "x" * 160
