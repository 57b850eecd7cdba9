"""``hf-poprisk judge``: labelled texts judged without training."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from models import WORDS, save_tiny_model, tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForSequenceClassification, BertModel, DataCollatorWithPadding

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments
from hf_poprisk.__main__ import main
from hf_poprisk.leave_one_out import INDEX, mixin
from leave_one_out.helpers import QUIET
from leave_one_out.test_judge_command import refused, run, table
from leave_one_out.test_page import Page

NAMES = ["north", "south", "west"]


def labelled(count: int = 60, rate: float = 0.2) -> Dataset:
    """Texts of three lengths, mostly of a third of the words; some labels are of another class."""
    rng, words = np.random.default_rng(0), sorted(set(WORDS))
    true = np.arange(count) % 3
    flipped = rng.permutation(count) < rate * count
    labels = np.where(flipped, (true + rng.integers(1, 3, count)) % 3, true)
    texts = [
        " ".join(rng.choice(words[c::3] if rng.random() < 0.9 else words) for _ in range(8 + 3 * (i % 4)))
        for i, c in enumerate(true)
    ]
    rows = Dataset.from_dict({"text": texts, "label": labels, "is_flipped": flipped, "margin": labels / 2})
    return rows.cast_column("label", ClassLabel(names=NAMES))


@pytest.fixture(scope="session")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "bert", "bert")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    labelled().save_to_disk(str(tmp_path / "data"))
    return tmp_path / "data"


def edited(folder: Path, kind: str, **changes: Any) -> Path:
    """A tiny model with another config."""
    config = save_tiny_model(folder, kind) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return folder


def test_it_is_what_an_audit_in_training_finds(
    bert_dir: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, rows = tiny_tokenizer(), labelled()
    args = PopRiskTrainingArguments(
        str(tmp_path / "trainer"), poprisk_label_noise="audit", per_device_train_batch_size=4, **QUIET
    )
    trainer = PopRiskTrainer(
        AutoModelForSequenceClassification.from_pretrained(bert_dir),
        args=args,
        train_dataset=rows.remove_columns("margin").map(lambda row: tokenizer(row["text"])),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    expected = trainer.judge_labels()
    out = tmp_path / "out"
    monkeypatch.setitem(sys.modules, "trl", None)  # of no use here
    printed = run(capsys, bert_dir, data, "--output_dir", out, "--per_device_train_batch_size", 4)
    found, flips = table(out), np.array(rows["is_flipped"])
    np.testing.assert_allclose(found["log_odds"], expected.log_odds, rtol=1e-4)
    np.testing.assert_allclose(found["p_correct"], expected.p_correct, atol=1e-5)
    assert found["index"].tolist() == list(range(60)) and found["visits"].tolist() == [1] * 60
    assert roc_auc_score(flips, -found["log_odds"]) > 0.8
    report, _, files = printed.partition("\n\njudged labels: ")
    assert files == f"{out}/judged.parquet\npage: {out}/report.html\n"
    assert report + "\n" == run(capsys, out, "--dataset", data, command="audit")
    assert "60 examples\nNoise rate: " in report and "Known to be mislabeled (is_flipped): 12 of" in report
    worst = int(np.argmin(found["log_odds"]))
    assert f"      text: {rows[worst]['text']}\n      label: {NAMES[rows[worst]['label']]}\n" in report
    assert sorted(file.name for file in out.iterdir()) == ["judged.parquet", "report.html"]
    page, order = Page(out / "report.html"), np.argsort(found["log_odds"], kind="stable")
    assert page.columns == ["text", "label"] and page.column("text") == [rows["text"][i] for i in order]
    assert page.column("label") == [NAMES[rows["label"][i]] for i in order]


def test_a_model_without_a_head_gets_one(data: Path, tmp_path: Path, capsys: Any) -> None:
    """A decoder, whose config does not say what fills up a batch."""
    model = edited(tmp_path / "llama", "llama", pad_token_id=None)
    scores = []
    for name, size in (("one", 8), ("again", 8), ("alone", 1)):
        argv = (model, data, "--output_dir", tmp_path / name, "--per_device_train_batch_size", size)
        assert f"\n\nhead: {model} has none for these labels, so a random one" in run(capsys, *argv)
        scores.append(table(tmp_path / name)["log_odds"])
        torch.manual_seed(5)
    assert np.array_equal(scores[0], scores[1])
    assert np.corrcoef(scores[0], scores[2])[0, 1] > 0.97  # but for the signs of eigenvectors
    assert roc_auc_score(labelled()["is_flipped"], -scores[0]) > 0.8


def test_an_encoder_needs_no_pooler(data: Path, tmp_path: Path, capsys: Any) -> None:
    """Which models trained on masked words come without."""
    BertModel(tiny_model("bert").config, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    assert "\n\nhead: " in run(capsys, tmp_path / "bert", data, "--output_dir", tmp_path / "out")


def test_an_adapter_may_bring_the_head(llama_dir: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(llama_dir, num_labels=3)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], modules_to_save=["score"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    argv = (llama_dir, data, "--output_dir", tmp_path / "out", "--adapter", tmp_path / "adapter")
    assert "head: " not in run(capsys, *argv)


def test_rows_are_known_again(bert_dir: Path, tmp_path: Path, capsys: Any) -> None:
    """By their index, and the labels by their values."""
    ids = 1000 - 7 * np.arange(60)
    indexed = labelled().add_column(INDEX, ids)
    indexed.shuffle(seed=1).to_parquet(tmp_path / "shuffled.parquet")
    indexed.to_parquet(tmp_path / "rows.parquet")
    run(capsys, bert_dir, tmp_path / "shuffled.parquet", "--output_dir", tmp_path / "out")
    argv = (tmp_path / "out", "--dataset", tmp_path / "rows.parquet")
    assert "; AUROC " in run(capsys, *argv, command="audit")
    write = ("--write", "weighted", "--to", tmp_path / "copy", "--force")
    run(capsys, *argv, *write, command="audit")
    found = table(tmp_path / "out")
    weight = dict(zip(found["index"].tolist(), (2 * found["p_correct"] - 1).clip(0).tolist(), strict=True))
    written = datasets.load_from_disk(str(tmp_path / "copy"))["label_weight"][:]
    assert written == pytest.approx([weight[i] for i in ids], abs=1e-6) and min(written) < max(written)
    other = indexed.map(lambda row: {"label": (row["label"] + 1) % 3})
    other.to_parquet(tmp_path / "other.parquet")
    says = refused(capsys, tmp_path / "out", "--dataset", tmp_path / "other.parquet", command="audit")
    assert "the data are not those of the run: 'label' of the row" in says


def test_texts_are_truncated(
    bert_dir: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(model: Any, batches: Any, *args: Any, **kwargs: Any) -> None:
        raise ValueError(f"{model.dtype} {list(next(iter(batches(None)))['input_ids'].shape)}.")

    monkeypatch.setattr(mixin, "label_features", look)
    argv = (bert_dir, data, "--output_dir", tmp_path / "out")
    assert refused(capsys, *argv, "--dtype", "bfloat16", "--max_length", 9) == "torch.bfloat16 [8, 9]."
    long = changed("text", lambda rows: [f"{text} " * 40 for text in rows["text"]])
    long.to_parquet(tmp_path / "long.parquet")
    assert refused(capsys, bert_dir, tmp_path / "long.parquet", *argv[2:]) == "torch.float32 [8, 128]."
    assert refused(capsys, *argv, "--max_length", 129).endswith(f"too long: {bert_dir} takes 128 tokens.")


# -- refusals -----------------------------------------------------------------------------------------------


def changed(column: str, values: Callable[[dict[str, list[Any]]], Any]) -> Dataset:
    rows = labelled().to_dict()
    return Dataset.from_dict({**rows, column: values(rows)})


REFUSED = {
    "neither": (
        lambda: labelled().remove_columns("label"),
        "has no columns chosen and rejected (it has is_flipped, margin, text), for pairs, and no columns "
        "text and label, for classes.",
    ),
    "no text": (lambda: labelled().rename_column("text", "sentence"), "no column text (it has is_flipped,"),
    "few": (lambda: labelled(49), "has 49 examples, too few to judge labels by: it takes 50 or more."),
    "names": (lambda: changed("label", lambda rows: ["a", "b"] * 30), "must hold integers, one for each"),
    "numbers": (lambda: changed("label", lambda rows: [0.0, 1.0] * 30), "must hold integers, one for each"),
    "several": (lambda: changed("label", lambda rows: [[0], [1]] * 30), "must hold integers, one for each"),
    "missing": (lambda: changed("label", lambda rows: [0, 1, None] * 20), "has no label in row 2: give"),
    "negative": (lambda: changed("label", lambda rows: [0, 1, -1] * 20), "has the label -1 in row 2: give"),
    "same": (lambda: changed("label", lambda rows: [1] * 60), "all labels of "),
    "empty": (lambda: changed("text", lambda rows: [*rows["text"][:59], " \n"]), "has no text in row 59."),
    "no value": (lambda: changed("text", lambda rows: [None, *rows["text"][1:]]), "has no text in row 0."),
    "lists": (lambda: changed("text", lambda rows: [["a"]] * 60), "column text of "),
    "one text": (lambda: changed("text", lambda rows: ["a"] * 60), "all texts of "),
    "classes": (
        lambda: labelled().cast_column("label", ClassLabel(names=[*NAMES, "east"])),
        "has 4 classes, and ",
    ),
    "tokens": (lambda: changed("input_ids", lambda rows: [[1]] * 60), "remove the column input_ids."),
    "index": (lambda: changed(INDEX, lambda rows: [0] * 60), "example_index of the data must hold integers"),
    "images": (
        lambda: changed("image", lambda rows: ["a"] * 60),
        "holds images, and judge reads texts alone.",
    ),
}


@pytest.mark.parametrize(("rows", "says"), REFUSED.values(), ids=REFUSED)
def test_data_are_refused_before_the_model_is_loaded(
    rows: Callable[[], Dataset],
    says: str,
    bert_dir: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", None)
    rows().save_to_disk(str(tmp_path / "data"))
    before = sorted(tmp_path.rglob("*"))
    assert says in refused(capsys, bert_dir, tmp_path / "data", "--output_dir", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_models_are_refused(
    bert_dir: Path,
    llama_dir: Path,
    data: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sentence(model: Path, *options: Any, rows: Path = data) -> str:
        return refused(capsys, model, rows, "--output_dir", tmp_path / "out", *options)

    model = save_tiny_model(tmp_path / "holes", "bert")
    weights = load_file(model / "model.safetensors")
    for name in ("classifier.bias", "bert.pooler.dense.bias", "bert.encoder.layer.1.output.dense.weight"):
        del weights[name]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert sentence(model).endswith("no bert.encoder.layer.1.output.dense.weight, which would be random.")
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", None)  # the rest is before
    for problem in ("regression", "multi_label_classification"):
        says = sentence(edited(tmp_path / problem, "bert", problem_type=problem))
        assert f"{problem} is for {problem} (its problem_type), and judge takes one label" in says
    reward = edited(tmp_path / "reward", "bert", id2label={"0": "a"}, label2id={"a": 0})
    assert sentence(reward).endswith("gives one number and no classes: it is for regression or a reward.")
    assert sentence(bert_dir, "--reward").startswith("--reward is for preference pairs, and ")
    far = changed("label", lambda rows: [0, 60] * 30)
    far.to_parquet(tmp_path / "far.parquet")
    says = sentence(llama_dir, rows=tmp_path / "far.parquet")
    assert says.endswith("has labels up to 60 in 60 rows: count them from 0.")
    bare = tiny_tokenizer()
    tiny_model("bert").save_pretrained(tmp_path / "bare")
    bare.pad_token = bare.eos_token = None
    bare.save_pretrained(tmp_path / "bare")
    assert sentence(tmp_path / "bare").endswith("bare has no pad_token, which fills up a batch.")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("where", ["features", "page"])
def test_an_interrupted_run_leaves_nothing(
    where: str, bert_dir: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    before = sorted(tmp_path.rglob("*"))
    if where == "features":
        monkeypatch.setattr(mixin, "label_features", stop)
    else:
        monkeypatch.setattr("hf_poprisk.leave_one_out.judge_command.write_page", stop)
    with pytest.raises(SystemExit) as stopped:
        main(["judge", str(bert_dir), str(data), "--output_dir", str(tmp_path / "out")])
    assert stopped.value.code == 130 and capsys.readouterr().out == ""
    assert sorted(tmp_path.rglob("*")) == before and datasets.is_caching_enabled()
