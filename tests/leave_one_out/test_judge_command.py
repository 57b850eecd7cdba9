"""``hf-poprisk judge``: preference pairs and labelled texts judged without training."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, load_dataset
from fake_hub import FakeHub
from models import adapted, save_tiny_model, text, tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertModel,
    DataCollatorWithPadding,
    LlamaModel,
)

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments
from hf_poprisk.__main__ import main
from hf_poprisk.leave_one_out import INDEX, features, judge_command, mixin
from hf_poprisk.leave_one_out.table import read_table
from leave_one_out.helpers import QUIET, conversations, labelled, learnable, prefer
from leave_one_out.judged import command as audit
from leave_one_out.judged import message
from leave_one_out.judged import refused as any_refused
from leave_one_out.test_page import Page

TEMPLATE = "{% for m in messages %}{{ m['content'] }} <|end|>{% endfor %}"
FLIPS = np.array(learnable()["is_flipped"])

run = partial(audit, name="judge")
refused = partial(any_refused, name="judge")


def changed(rows: Dataset, column: str, values: Any) -> Dataset:
    return Dataset.from_dict({**rows.to_dict(), column: values})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a llama, a bert and a reward model."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("llama", "bert"):
        save_tiny_model(folder / kind, kind)
    config = tiny_model().config
    config.num_labels = 1
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    tiny_tokenizer().save_pretrained(folder / "reward")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    learnable().to_parquet(tmp_path / "pairs.parquet")
    return tmp_path / "pairs.parquet"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    labelled().save_to_disk(str(tmp_path / "texts"))
    return tmp_path / "texts"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "out"


def edited(folder: Path, kind: str, **changes: Any) -> Path:
    """A tiny model with another config."""
    config = save_tiny_model(folder, kind) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return folder


def with_weights(folder: Path, kind: str, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A tiny model with other weights."""
    model = save_tiny_model(folder, kind)
    weights = load_file(model / "model.safetensors")
    edit(weights)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return model


def table(out: Path) -> dict[str, np.ndarray]:
    columns = pq.read_table(out / "judged.parquet")
    return {name: columns[name].to_numpy() for name in columns.column_names}


# -- what is found ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", ["DPO", "Reward"])
def test_pairs_are_judged_as_in_training_without_their_reference(
    kind: str, chat: bool, tiny: Path, tmp_path: Path, out: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose arithmetic is another one: TRL trains in bfloat16 unless told otherwise."""
    model, rows = tiny / ("llama" if kind == "DPO" else "reward"), learnable()
    if chat:
        model = Path(shutil.copytree(model, tmp_path / "model"))
        (model / "chat_template.jinja").write_text(TEMPLATE)
        rows = conversations()
    rows.to_json(tmp_path / "pairs.jsonl")
    options = {"poprisk_label_noise": "audit", "bf16": None, "max_steps": 1}
    trainer = prefer(kind, model, tmp_path / "trainer", rows, per_device_train_batch_size=8, **options)
    trainer.train()
    assert trainer.args.bf16
    calls = {"__init__": 0, "forward": 0}
    for name in calls:
        inner = getattr(LlamaModel, name)

        def counted(*args: Any, _inner: Any = inner, _name: str = name, **kwargs: Any) -> Any:
            calls[_name] += 1
            return _inner(*args, **kwargs)

        monkeypatch.setattr(LlamaModel, name, counted)
    argv = [model, tmp_path / "pairs.jsonl", "--output_dir", out, *["--reward"] * (kind == "Reward")]
    printed = run(capsys, *argv)
    # one model, which passes over 60 pairs twice for the bases and once for the features, and a check
    assert calls == {"__init__": 1, "forward": 3 * 8 + 1}
    found, expected = table(out), read_table(tmp_path / "trainer")[0]
    for name in ("index", "log_odds", "p_correct"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-6)
    assert found["index"].tolist() == list(range(60)) and found["visits"].tolist() == [1] * 60
    assert roc_auc_score(FLIPS, -found["log_odds"]) > 0.75
    assert np.array_equal(np.argsort(found["rank"]), np.argsort(found["log_odds"], kind="stable"))
    report, _, files = printed.partition("\n\njudged labels: ")
    assert files == f"{out}/judged.parquet\npage: {out}/report.html\n"
    assert report + "\n" == audit(capsys, out, "--dataset", tmp_path / "pairs.jsonl")
    assert "60 preference pairs\nNoise rate: " in report and ("; AUROC " in report) != chat
    assert sorted(file.name for file in out.iterdir()) == ["judged.parquet", "report.html"]
    assert learnable()["chosen"][7].strip() in (out / "report.html").read_text()
    # and once more
    says = f"--output_dir {out} holds labels that were judged: hf-poprisk audit {out} shows them; to judge a"
    assert says in refused(capsys, *argv)


def test_classes_are_judged_as_in_training(
    tiny: Path, texts: Path, tmp_path: Path, out: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, rows = tiny_tokenizer(), labelled()
    args = PopRiskTrainingArguments(
        str(tmp_path / "trainer"),
        poprisk_label_noise="audit",
        per_device_train_batch_size=8,
        bf16=True,
        max_steps=1,
        **QUIET,
    )
    trainer = PopRiskTrainer(
        AutoModelForSequenceClassification.from_pretrained(tiny / "bert"),
        args=args,
        train_dataset=rows.remove_columns("margin").map(lambda row: tokenizer(row["text"])),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    monkeypatch.setitem(sys.modules, "trl", None)  # of no use here
    printed = run(capsys, tiny / "bert", texts, "--output_dir", out)
    found, expected = table(out), read_table(tmp_path / "trainer")[0]
    for name in ("index", "log_odds", "p_correct"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert roc_auc_score(rows["is_flipped"], -found["log_odds"]) > 0.8
    report = printed.partition("\n\njudged labels: ")[0]
    assert report + "\n" == audit(capsys, out, "--dataset", texts)
    assert "60 examples\nNoise rate: " in report and "Known to be mislabeled (is_flipped): 12 of" in report
    worst, names = int(np.argmin(found["log_odds"])), rows.features["label"].names
    assert f"      text: {rows[worst]['text']}\n      label: {names[rows[worst]['label']]}\n" in report
    page, order = Page(out / "report.html"), np.argsort(found["log_odds"], kind="stable")
    assert page.columns == ["text", "label"] and page.column("text") == [rows["text"][i] for i in order]
    assert page.column("label") == [names[rows["label"][i]] for i in order]


def test_an_adapter_counts_and_may_bring_the_head(
    tiny: Path, data: Path, texts: Path, tmp_path: Path, out: Path, capsys: Any
) -> None:
    torch.manual_seed(3)
    model = adapted(AutoModelForCausalLM.from_pretrained(tiny / "llama"), "lora")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(10)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    lora, scores = [tiny / "llama", "--adapter", tmp_path / "adapter"], []
    for number, argv in enumerate((lora, [tmp_path / "merged"], [tiny / "llama"])):
        run(capsys, *argv, data, "--output_dir", tmp_path / str(number))
        scores.append(table(tmp_path / str(number))["log_odds"])
    # eigenvectors have any sign, so that the projection of several layers adds up to something else
    assert np.corrcoef(scores)[0, 1] > 0.97 > np.corrcoef(scores)[0, 2]
    says = refused(capsys, *lora, "--reward", data, "--output_dir", out)
    assert says.endswith("it holds no score.weight, which would be random.")
    model = AutoModelForSequenceClassification.from_pretrained(tiny / "llama", num_labels=3)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], modules_to_save=["score"])
    get_peft_model(model, config).save_pretrained(tmp_path / "head")
    argv = [tiny / "llama", texts, "--output_dir", out, "--adapter", tmp_path / "head"]
    assert "head: " not in run(capsys, *argv)


def test_a_model_without_a_head_gets_one(tiny: Path, texts: Path, tmp_path: Path, capsys: Any) -> None:
    """A decoder, whose config does not say what fills up a batch."""
    model = edited(tmp_path / "llama", "llama", pad_token_id=None)
    scores = []
    for name, size in (("one", 8), ("again", 8), ("alone", 1)):
        argv = (model, texts, "--output_dir", tmp_path / name, "--per_device_train_batch_size", size)
        assert f"\n\nhead: {model} has none for these labels, so a random one" in run(capsys, *argv)
        scores.append(table(tmp_path / name)["log_odds"])
        torch.manual_seed(5)
    assert np.array_equal(scores[0], scores[1])
    assert np.corrcoef(scores[0], scores[2])[0, 1] > 0.97  # but for the signs of eigenvectors
    assert roc_auc_score(labelled()["is_flipped"], -scores[0]) > 0.8
    # an encoder needs no pooler, which models trained on masked words come without
    BertModel(tiny_model("bert").config, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    assert "\n\nhead: " in run(capsys, tmp_path / "bert", texts, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize("kind", ["pairs", "classes"])
def test_rows_are_known_by_their_index(kind: str, tiny: Path, tmp_path: Path, out: Path, capsys: Any) -> None:
    """From the judge to the copy."""
    rows, model = (learnable(), "llama") if kind == "pairs" else (labelled(), "bert")
    ids = 1000 - 7 * np.arange(60)
    indexed = rows.add_column(INDEX, ids)
    indexed.shuffle(seed=1).save_to_disk(str(tmp_path / "shuffled"))
    indexed.to_parquet(tmp_path / "rows.parquet")
    before = sorted((tmp_path / "shuffled").iterdir())
    out.mkdir(parents=True)  # empty: allowed
    printed = run(capsys, tiny / model, tmp_path / "shuffled", "--output_dir", out)
    assert sorted((tmp_path / "shuffled").iterdir()) == before  # no tokens beside somebody's data
    found = table(out)
    flips = dict(zip(ids.tolist(), rows["is_flipped"], strict=True))
    assert roc_auc_score([flips[index] for index in found["index"]], -found["log_odds"]) > 0.8
    worst = found["index"][np.argmin(found["rank"])]
    shown = rows[int((1000 - worst) // 7)]["chosen" if kind == "pairs" else "text"].strip()
    assert f"\n  {worst}, correct with probability" in printed and f": {shown}\n" in printed
    write = ("--write", "filtered" if kind == "pairs" else "weighted", "--to", tmp_path / "copy", "--force")
    assert f": {shown}\n" in audit(capsys, out, "--dataset", tmp_path / "rows.parquet", *write)
    copy = load_dataset(str(tmp_path / "copy"), split="train")
    p = dict(zip(found["index"].tolist(), found["p_correct"], strict=True))
    if kind == "pairs":
        assert copy[INDEX][:] == [i for i in ids if p[i] >= 0.5]
        return
    written = copy["label_weight"][:]
    assert written == pytest.approx([max(2 * p[i] - 1, 0) for i in ids], abs=1e-6)
    assert min(written) < max(written)
    indexed.map(lambda row: {"label": (row["label"] + 1) % 3}).to_parquet(tmp_path / "other.parquet")
    says = any_refused(capsys, out, "--dataset", tmp_path / "other.parquet")
    assert "the data are not those of the run: 'label' of the row" in says


def test_conversations_and_pairs_that_are_too_long(tmp_path: Path, out: Path, capsys: Any) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    rows = conversations().to_list()
    for side in ("chosen", "rejected"):
        rows[7][side][0]["content"] = text(7, 80)
    Dataset.from_list(rows).to_json(tmp_path / "pairs.jsonl")
    argv = (model, tmp_path / "pairs.jsonl", "--output_dir", out, "--max_length", 64)
    assert "59 preference pairs (1 more were never judged)" in run(capsys, *argv)
    found = table(out)
    assert np.flatnonzero(found["visits"] == 0).tolist() == [7] and np.isnan(found["rank"][7])
    assert sorted(np.delete(found["rank"], 7)) == list(range(59))


def test_options_reach_the_model(
    tiny: Path, data: Path, texts: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(model: Any, batches: Any, *args: Any, **kwargs: Any) -> None:
        raise ValueError(f"{model.dtype} {list(next(iter(batches(None)))['input_ids'].shape)}.")

    monkeypatch.setattr(mixin, "label_features", look)
    long = changed(labelled(), "text", [f"{text} " * 40 for text in labelled()["text"]])
    long.to_parquet(tmp_path / "long.parquet")
    options = ("--dtype", "bfloat16", "--per_device_train_batch_size", 3, "--max_length", 9)
    for model, rows, more, says in (
        ("llama", data, options, "torch.bfloat16 [6, 9]."),
        ("llama", data, (), "torch.float32 [16, "),
        ("llama", data, ("--split", "train[:49]"), f"{data} has 49 pairs"),
        ("bert", texts, options, "torch.bfloat16 [3, 9]."),
        ("bert", tmp_path / "long.parquet", (), "torch.float32 [8, 128]."),
        ("bert", texts, ("--max_length", 129), "--max_length 129 is too long: "),
    ):
        assert refused(capsys, tiny / model, rows, "--output_dir", tmp_path / "out", *more).startswith(says)


# -- refusals -----------------------------------------------------------------------------------------------


def put(column: str, values: Any) -> Callable[[Dataset], Dataset]:
    return lambda rows: changed(rows, column, values)


def first(count: int) -> Callable[[Dataset], Dataset]:
    return lambda rows: rows.select(range(count))


FEW, INTEGERS = "too few to judge labels by: it takes 50 or more.", "must hold integers, one for each text"
BOTH = [
    (put("images", ["a"] * 60), "holds images, and judge reads texts alone."),
    (put(INDEX, [0] * 60), "column example_index of the data must hold integers, each"),
]
EAST = ClassLabel(names=["north", "south", "west", "east"])
PAIRS: list[tuple[Callable[[Dataset], Dataset], str]] = [
    (lambda rows: rows.remove_columns("rejected"), "no columns chosen and rejected (it has chosen,"),
    (first(49), f"has 49 pairs, {FEW}"),
    (lambda rows: rows.select([3] * 60), "all pairs of "),
    (lambda rows: put("rejected", rows["chosen"][:])(rows), "chosen and rejected are the same in all pairs"),
    (put("chosen", ["a"] * 9 + [None] * 51), "has no chosen in row 9."),
    (put("prompt", [[message("user", "a")]] * 60), "either texts or conversations in all"),
    (lambda rows: conversations(), "has no chat template, and "),
    (put("is_flipped", [None] * 9 + [True] * 51), "is_flipped of the data has missing values"),
]
TEXTS: list[tuple[Callable[[Dataset], Dataset], str]] = [
    (
        lambda rows: rows.remove_columns("label"),
        "has no columns chosen and rejected (it has is_flipped, margin, text), for pairs, and no columns "
        "text and label, for classes.",
    ),
    (lambda rows: rows.rename_column("text", "sentence"), "no column text (it has is_flipped,"),
    (first(49), f"has 49 examples, {FEW}"),
    *((put("label", values * 30), INTEGERS) for values in (["a", "b"], [0.0, 1.0], [[0], [1]])),
    (put("label", [0, 1, None] * 20), "has no label in row 2: give"),
    (put("label", [0, 1, -1] * 20), "has the label -1 in row 2: give"),
    (put("label", [1] * 60), "all labels of "),
    (put("text", ["a"] * 59 + [" \n"]), "has no text in row 59."),
    (put("text", [None] + ["a"] * 59), "has no text in row 0."),
    (put("text", [["a"]] * 60), "column text of "),
    (put("text", ["a"] * 60), "all texts of "),
    (lambda rows: rows.cast_column("label", EAST), "has 4 classes, and "),
    (put("input_ids", [[1]] * 60), "remove the column input_ids."),
]


@pytest.mark.parametrize(
    ("rows", "change", "says"),
    [*((learnable, *case) for case in (*PAIRS, *BOTH)), *((labelled, *case) for case in (*TEXTS, *BOTH))],
)
def test_data_are_refused_before_the_model_is_loaded(
    rows: Callable[[], Dataset],
    change: Callable[[Dataset], Dataset],
    says: str,
    tiny: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        monkeypatch.setattr(kind, "from_pretrained", None)
    model = tiny / ("llama" if rows is learnable else "bert")
    change(rows()).save_to_disk(str(tmp_path / "data"))
    before = sorted(tmp_path.rglob("*"))
    assert says in refused(capsys, model, tmp_path / "data", "--output_dir", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_targets_and_options_are_refused_first(
    tiny: Path, tmp_path: Path, data: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sentence(*options: Any) -> str:
        return refused(capsys, tmp_path / "nowhere", *options)  # which would be noticed next

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    out = ("--output_dir", tmp_path / "out")
    full = sentence(data, "--output_dir", tmp_path / "full")
    assert full == f"--output_dir {tmp_path / 'full'} is not empty: give another folder."
    assert sentence(data, "--output_dir", data) == f"--output_dir {data} is a file: give a folder."
    assert "lies inside the data" in sentence(tmp_path, *out)
    for model, package, options in (
        (tmp_path / "nowhere", "datasets", []),
        (tmp_path / "nowhere", "peft", ["--adapter", "x"]),
        (tiny / "llama", "trl", []),  # pairs alone need it
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            says = refused(capsys, model, data, *out, *options)
            assert says == f"judge needs {package}: pip install 'hf_poprisk[recipes]'."
    assert "is not a model (" in sentence(data, *out)
    assert refused(capsys, tiny / "llama", "typo.jsonl", *out) == "DATASET typo.jsonl is not there."
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "set CUDA_VISIBLE_DEVICES" in sentence(data, *out)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process" in sentence(data, *out)
    for wrong in ("--max_length 0", "--per_device_train_batch_size x", "--dtype int8", "--seed 1"):
        with pytest.raises(SystemExit):
            main(["judge", "model", str(data), "--output_dir", str(tmp_path / "out"), *wrong.split()])
        assert wrong.split()[0] in capsys.readouterr().err


def test_models_are_refused(
    tiny: Path, data: Path, texts: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sentence(model: Path, *options: Any, rows: Path = data) -> str:
        return refused(capsys, model, rows, "--output_dir", tmp_path / "out", *options)

    def poison(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][3, 2] = torch.nan

    def empty(weights: dict[str, torch.Tensor]) -> None:
        for name in ("classifier.bias", "bert.pooler.dense.bias", "bert.encoder.layer.1.output.dense.weight"):
            del weights[name]

    says = sentence(with_weights(tmp_path / "nan", "llama", poison))
    assert says.endswith("nan are not finite: model.layers.1.mlp.up_proj.weight holds NaN or inf.")
    headless = with_weights(tmp_path / "headless", "llama", lambda weights: weights.pop("lm_head.weight"))
    assert sentence(headless).endswith("it holds no lm_head.weight, which would be random.")
    says = sentence(with_weights(tmp_path / "holes", "bert", empty), rows=texts)
    assert says.endswith("no bert.encoder.layer.1.output.dense.weight, which would be random.")
    broken = save_tiny_model(tmp_path / "broken", "llama")
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert "broken cannot be loaded (" in sentence(broken)
    tiny_model().save_pretrained(tmp_path / "mute")
    assert "mute has no tokenizer (" in sentence(tmp_path / "mute")

    for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification):  # the rest is seen before
        monkeypatch.setattr(kind, "from_pretrained", None)
    says = sentence(tiny / "llama", "--reward")
    assert "llama is not a reward model: it is a LlamaForCausalLM." in says
    assert "is a LlamaForSequenceClassification: add --reward" in sentence(tiny / "reward")
    names = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    (tmp_path / "three").mkdir()
    config = json.loads((tiny / "reward" / "config.json").read_text()) | names
    (tmp_path / "three" / "config.json").write_text(json.dumps(config))
    says = sentence(tmp_path / "three", "--reward")
    assert "three is not a reward model: it has 3 labels and not one." in says
    says = sentence(tiny / "llama", "--adapter", data.parent)
    assert f"--adapter {data.parent} is not a PEFT adapter (" in says

    for problem in ("regression", "multi_label_classification"):
        says = sentence(edited(tmp_path / problem, "bert", problem_type=problem), rows=texts)
        assert f"{problem} is for {problem} (its problem_type), and judge takes one label" in says
    reward = edited(tmp_path / "reward", "bert", id2label={"0": "a"}, label2id={"a": 0})
    says = sentence(reward, rows=texts)
    assert says.endswith("gives one number and no classes: it is for regression or a reward.")
    says = sentence(tiny / "bert", "--reward", rows=texts)
    assert says.startswith("--reward is for preference pairs, and ")
    changed(labelled(), "label", [0, 60] * 30).to_parquet(tmp_path / "far.parquet")
    says = sentence(tiny / "llama", rows=tmp_path / "far.parquet")
    assert says.endswith("has labels up to 60 in 60 rows: count them from 0.")
    bare = tiny_tokenizer()
    tiny_model("bert").save_pretrained(tmp_path / "bare")
    bare.pad_token = bare.eos_token = None
    bare.save_pretrained(tmp_path / "bare")
    assert sentence(tmp_path / "bare", rows=texts).endswith("bare has no pad_token, which fills up a batch.")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("where", "name", "error", "code"),
    [
        (mixin, "label_features", ValueError("nothing to tell."), 2),
        (mixin, "label_features", KeyboardInterrupt, 130),
        (pq, "write_table", KeyboardInterrupt, 130),
        (judge_command, "write_page", KeyboardInterrupt, 130),
    ],
)
def test_a_run_that_ends_early_leaves_nothing_but_its_chunks(
    where: Any, name: str, error: Any, code: int, tiny: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        if where is mixin:  # of the long part a kill leaves nothing beside OUT
            assert sorted(tmp_path.rglob("*")) == before
        raise error

    learnable().save_to_disk(str(tmp_path / "data"))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(where, name, stop)
    argv = [str(tiny / "llama"), str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        main(["judge", *argv])
    assert stopped.value.code == code and capsys.readouterr().out == ""
    left = {path.relative_to(tmp_path).parts[0] for path in {*tmp_path.rglob("*")} - {*before}}
    assert left == (set() if where is mixin else {"out"}) and datasets.is_caching_enabled()
    assert all(path.name.startswith("unfinished-") for path in (tmp_path / "out").glob("*"))


@pytest.mark.parametrize("kind", ["pairs", "classes"])
def test_a_killed_run_goes_on(
    kind: str,
    tiny: Path,
    data: Path,
    texts: Path,
    tmp_path: Path,
    out: Path,
    capsys: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same numbers, bit for bit, for fewer passes."""
    monkeypatch.setattr(features, "_CHUNK", 2)
    backward, calls, fatal = features.LinearFactors.backward, 0, 0

    def counted(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fatal:
            raise KeyboardInterrupt
        backward(*args)

    monkeypatch.setattr(features.LinearFactors, "backward", counted)
    argv = [tiny / "llama", data] if kind == "pairs" else [tiny / "bert", texts]

    def killed() -> Path:
        nonlocal calls, fatal
        calls, fatal = 0, 1 + 2 * 8 + 6  # a check, the bases, five micro-batches
        with pytest.raises(SystemExit):
            main(["judge", *map(str, argv), "--output_dir", str(out)])
        calls, fatal = 0, 0
        [folder] = out.iterdir()
        assert sorted(path.name for path in folder.iterdir()) == ["00000", "00001", "bases"]
        return folder

    def scores(folder: Path, *options: Any) -> list[list[float]]:
        run(capsys, *argv, "--output_dir", folder, *options)
        assert sorted(file.name for file in folder.iterdir()) == ["judged.parquet", "report.html"]
        return [table(folder)[name].tolist() for name in ("index", "log_odds", "p_correct")]

    whole = scores(tmp_path / "whole")
    assert calls == 1 + 3 * 8
    chunk = killed() / "00002"
    chunk.write_bytes((chunk.parent / "00001").read_bytes()[:-100])  # no chunk
    assert scores(out) == whole and calls == 4
    assert f"judge goes on from what {out} holds of it." in caplog.text
    shutil.rmtree(out)
    caplog.clear()
    killed()
    smaller = ["--per_device_train_batch_size", 4]
    assert scores(out, *smaller) == scores(tmp_path / "smaller", *smaller)
    assert f"{out} held chunks of another model, other data or options: judge starts anew." in caplog.text


def test_a_refusal_leaves_no_chunks(
    tiny: Path, data: Path, out: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no(parts: Any) -> None:
        assert list(out.iterdir())
        raise ValueError("nothing to tell.")

    monkeypatch.setattr(mixin, "judge_pairs", no)
    assert refused(capsys, tiny / "llama", data, "--output_dir", out) == "nothing to tell."
    assert not out.exists()


def test_judged_labels_are_pushed_as_a_data_set(tiny: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    hub = FakeHub()
    argv = [tiny / "llama", data, "--push_to_hub"]
    with hub.running(tmp_path):
        printed = run(capsys, *argv, "pairs-judged", "--output_dir", tmp_path / "out")
        repo = hub.repos["alice/pairs-judged"]
        assert (repo.private, repo.type) == (True, "dataset") and not repo.exposed
        files = repo.commits[-1].files
        assert printed.splitlines()[-1].startswith("pushed: ") and repo.commits[-1].oid in printed
        for name in ("judged.parquet", "report.html"):
            assert files.pop(name) == (tmp_path / "out" / name).read_bytes()
        card = files.pop("README.md").decode()
        assert not files and "# Labels of pairs.parquet, judged by llama\n" in card
        assert "\nNoise rate: " in card and str(tmp_path) not in card
        assert yaml.safe_load(card.split("---")[1])["tags"] == ["poprisk", "label-noise"]
        # before anything is judged
        says = refused(capsys, *argv, "bob/judged", "--output_dir", tmp_path / "no")
        assert says.startswith("--push_to_hub bob/judged cannot be made or written to (403 Forbidden")
        says = refused(capsys, *argv, "not a name", "--output_dir", tmp_path / "no")
        assert says.startswith("--push_to_hub not a name cannot be made")
        assert not (tmp_path / "no").exists()
        hub.faults["upload"] = 500  # after it
        with pytest.raises(SystemExit):
            run(capsys, *argv, "pairs-judged", "--output_dir", tmp_path / "late")
        out, err = capsys.readouterr()
    assert "Noise rate: " in out and "failed (" in err and "late is complete: hf upload alice/" in err
    assert (tmp_path / "late" / "report.html").is_file()


def test_trl_is_imported_by_the_command_alone(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom hf_poprisk.__main__ import main\n"
        "try:\n    main(['judge', sys.argv[1], 'x', '--output_dir', sys.argv[2]])\n"
        "finally:\n    assert 'trl' not in sys.modules"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "nowhere"), str(tmp_path / "out")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("hf-poprisk judge: error: ")
