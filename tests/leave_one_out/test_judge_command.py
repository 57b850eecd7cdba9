"""``hf-poprisk judge``: preference pairs judged without training."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_from_disk
from models import WORDS, adapted, save_tiny_model, text, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from hf_poprisk.__main__ import main
from hf_poprisk.leave_one_out import INDEX, mixin
from hf_poprisk.leave_one_out.audit import WRITES
from hf_poprisk.leave_one_out.data import load_data
from leave_one_out.helpers import prefer
from leave_one_out.judged import CHANCE, FIT, message, save_run

KNOWN, OTHER = sorted(set(WORDS))[::2], sorted(set(WORDS))[1::2]


def learnable(count: int = 60, rate: float = 0.2) -> Dataset:
    """Chosen is mostly of one half of the words, rejected of the other; some pairs are flipped."""
    generator = np.random.default_rng(0)

    def completion(usual: list[str], others: list[str]) -> str:
        return "".join(
            " " + generator.choice(usual if generator.random() < 0.9 else others) for _ in range(6)
        )

    pairs = [[completion(KNOWN, OTHER), completion(OTHER, KNOWN)] for _ in range(count)]
    flipped = generator.permutation(count) < rate * count
    return Dataset.from_dict(
        {
            "prompt": [text(i, 3) for i in range(count)],
            "chosen": [pair[flip] for pair, flip in zip(pairs, flipped.astype(int), strict=True)],
            "rejected": [pair[1 - flip] for pair, flip in zip(pairs, flipped.astype(int), strict=True)],
            "is_flipped": flipped,
        }
    )


def conversations(count: int = 60) -> Dataset:
    rows = learnable(count)
    return Dataset.from_dict(
        {
            side: [[message("user", row["prompt"]), message("assistant", row[side])] for row in rows]
            for side in ("chosen", "rejected")
        }
    )


@pytest.fixture(scope="session")
def reward_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "reward"
    config = tiny_model().config
    config.num_labels = 1
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    learnable().to_parquet(tmp_path / "pairs.parquet")
    return tmp_path / "pairs.parquet"


def run(capsys: pytest.CaptureFixture[str], *argv: Any, command: str = "judge") -> str:
    """What a command line prints."""
    capsys.readouterr()
    main([command, *map(str, argv)])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: Any, command: str = "judge") -> str:
    """The one sentence of a command line that prints nothing else."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([command, *map(str, argv)])
    out, err = capsys.readouterr()
    said = err.rpartition(f"hf-poprisk {command}: error: ")[2]  # progress bars stand before it
    assert stopped.value.code == 2 and out == "" and said.count("\n") == 1
    assert said.endswith((".\n", "'hf_poprisk[recipes]'.\n"))
    return said.strip()


def table(out: Path) -> dict[str, np.ndarray]:
    columns = pq.read_table(out / "judged.parquet")
    return {name: columns[name].to_numpy() for name in columns.column_names}


@pytest.mark.parametrize("kind", ["DPO", "Reward"])
def test_flipped_pairs_are_found(
    kind: str, llama_dir: Path, reward_dir: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    model = [llama_dir] if kind == "DPO" else [reward_dir, "--reward"]
    out, figure = tmp_path / "new" / "out", tmp_path / "labels.png"
    printed = run(capsys, *model, data, "--output_dir", out, "--plot", figure)
    found, flips = table(out), np.array(learnable()["is_flipped"])
    assert found["index"].tolist() == list(range(60)) and found["visits"].tolist() == [1] * 60
    assert roc_auc_score(flips, -found["log_odds"]) > 0.75
    assert np.array_equal(np.argsort(found["rank"]), np.argsort(found["log_odds"], kind="stable"))
    assert found["p_correct"][np.argsort(found["rank"])].tolist() == sorted(found["p_correct"])
    report, _, files = printed.partition("\n\njudged labels: ")
    assert (
        files == f"{out}/judged.parquet\npage: {out}/report.html\nfigure: {figure}\n"
        and figure.read_bytes()[1:4] == b"PNG"
    )
    assert report + "\n" == run(capsys, out, "--dataset", data, command="audit")
    assert "60 preference pairs\nNoise rate: " in report and "; AUROC " in report
    assert sorted(file.name for file in out.iterdir()) == ["judged.parquet", "report.html"]
    assert learnable()["chosen"][7].strip() in (out / "report.html").read_text()


def test_it_is_what_an_audit_in_training_finds_without_its_reference(
    llama_dir: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"poprisk_label_noise": "audit", "per_device_train_batch_size": 4}
    trainer = prefer("DPO", llama_dir, tmp_path / "trainer", learnable(), **options)
    expected = trainer.judge_labels()
    calls = {"__init__": 0, "forward": 0}
    for name in calls:
        inner = getattr(LlamaForCausalLM, name)

        def counted(*args: Any, _inner: Any = inner, _name: str = name, **kwargs: Any) -> Any:
            calls[_name] += 1
            return _inner(*args, **kwargs)

        monkeypatch.setattr(LlamaForCausalLM, name, counted)
    run(capsys, llama_dir, data, "--output_dir", tmp_path / "out", "--per_device_train_batch_size", 4)
    # one model, which passes over 60 pairs twice for the bases and once for the features, and a check
    assert calls == {"__init__": 1, "forward": 3 * 15 + 1}
    found = table(tmp_path / "out")
    np.testing.assert_allclose(found["log_odds"], expected.log_odds, rtol=1e-4)
    np.testing.assert_allclose(found["p_correct"], expected.p_correct, atol=1e-6)
    assert "warning" not in capsys.readouterr().err.lower()


def test_an_adapter_counts(llama_dir: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    torch.manual_seed(3)
    model = adapted(AutoModelForCausalLM.from_pretrained(llama_dir), "lora")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(10)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    scores = []
    for number, argv in enumerate(
        ([llama_dir, "--adapter", tmp_path / "adapter"], [tmp_path / "merged"], [llama_dir])
    ):
        run(capsys, *argv, data, "--output_dir", tmp_path / str(number))
        scores.append(table(tmp_path / str(number))["log_odds"])
    # eigenvectors have any sign, so that the projection of several layers adds up to something else
    assert np.corrcoef(scores)[0, 1] > 0.97 > np.corrcoef(scores)[0, 2]
    argv = (llama_dir, "--adapter", tmp_path / "adapter", "--reward", data, "--output_dir", tmp_path / "out")
    assert refused(capsys, *argv).endswith("it holds no score.weight, which would be random.")


def test_pairs_are_known_by_their_index(llama_dir: Path, tmp_path: Path, capsys: Any) -> None:
    ids = 1000 - 7 * np.arange(60)
    indexed = learnable().add_column(INDEX, ids)
    indexed.shuffle(seed=1).save_to_disk(str(tmp_path / "shuffled"))
    indexed.to_json(tmp_path / "pairs.jsonl")
    before = sorted((tmp_path / "shuffled").iterdir())
    printed = run(capsys, llama_dir, tmp_path / "shuffled", "--output_dir", tmp_path / "out")
    assert sorted((tmp_path / "shuffled").iterdir()) == before  # no tokens beside somebody's data
    found = table(tmp_path / "out")
    assert sorted(found["index"]) == sorted(ids)
    flips = dict(zip(ids.tolist(), learnable()["is_flipped"], strict=True))
    assert roc_auc_score([flips[index] for index in found["index"]], -found["log_odds"]) > 0.85
    worst = found["index"][np.argmin(found["rank"])]
    chosen = learnable()[int((1000 - worst) // 7)]["chosen"].strip()
    assert f"\n  {worst}, correct with probability" in printed and f"chosen: {chosen}\n" in printed
    again = run(capsys, tmp_path / "out", "--dataset", tmp_path / "pairs.jsonl", command="audit")
    assert f"chosen: {chosen}\n" in again


def test_a_copy_of_what_was_judged(llama_dir: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").mkdir()  # empty: allowed
    run(capsys, llama_dir, data, "--output_dir", tmp_path / "out")
    argv = (tmp_path / "out", "--dataset", data, "--write", "filtered", "--to", tmp_path / "copy", "--force")
    run(capsys, *argv, command="audit")
    kept = np.flatnonzero(table(tmp_path / "out")["p_correct"] >= 0.5)
    copy = load_from_disk(str(tmp_path / "copy"))
    assert copy[INDEX][:] == kept.tolist() and copy["chosen"][:] == learnable().select(kept)["chosen"][:]


def test_conversations_and_pairs_that_are_too_long(tmp_path: Path, capsys: Any) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    template = "{% for m in messages %}{{ m['content'] }} <|end|>{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    rows = conversations().to_list()
    for side in ("chosen", "rejected"):
        rows[7][side][0]["content"] = text(7, 80)
    Dataset.from_list(rows).to_json(tmp_path / "pairs.jsonl")
    argv = (model, tmp_path / "pairs.jsonl", "--output_dir", tmp_path / "out", "--max_length", 64)
    assert "59 preference pairs (1 more were never judged)" in run(capsys, *argv)
    found = table(tmp_path / "out")
    assert np.flatnonzero(found["visits"] == 0).tolist() == [7] and np.isnan(found["rank"][7])
    assert sorted(np.delete(found["rank"], 7)) == list(range(59))


def test_options_reach_the_model(
    llama_dir: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(model: Any, batches: Any, *args: Any, **kwargs: Any) -> None:
        batch = next(iter(batches(None)))
        raise ValueError(f"{model.dtype} {list(batch['input_ids'].shape)}.")

    monkeypatch.setattr(mixin, "label_features", look)
    argv = (llama_dir, data, "--output_dir", tmp_path / "out")
    options = ("--dtype", "bfloat16", "--per_device_train_batch_size", 3, "--max_length", 9)
    assert refused(capsys, *argv, *options) == "torch.bfloat16 [6, 9]."
    assert refused(capsys, *argv).startswith("torch.float32 [16, ")
    assert "has 49 pairs" in refused(capsys, *argv, "--split", "train[:49]")


# -- refusals -----------------------------------------------------------------------------------------------


def changed(column: str, values: Any) -> Dataset:
    rows = learnable().to_dict()
    return Dataset.from_dict({**rows, column: values(rows)})


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        (
            lambda: learnable().remove_columns("rejected"),
            "has no columns chosen and rejected (it has chosen, is_f",
        ),
        (lambda: learnable(49), "has 49 pairs, too few to judge labels by: it takes 50 or more."),
        (lambda: learnable().select([3] * 60), "all pairs of "),
        (
            lambda: changed("rejected", lambda rows: rows["chosen"]),
            "chosen and rejected are the same in all pairs",
        ),
        (lambda: changed("chosen", lambda rows: [*rows["chosen"][:9], None] * 6), "has no chosen in row 9."),
        (
            lambda: changed("prompt", lambda rows: [[message("user", "a")]] * 60),
            "either texts or conversations in all",
        ),
        (
            lambda: changed(INDEX, lambda rows: [0] * 60),
            "column example_index of the data must hold integers, each",
        ),
        (lambda: changed("images", lambda rows: ["a"] * 60), "holds images, and judge reads texts alone."),
        (conversations, "has no chat template, and "),
        (
            lambda: changed("is_flipped", lambda rows: [None, *[True] * 59]),
            "is_flipped of the data has missing values",
        ),
    ],
    ids=[
        "columns",
        "few",
        "identical",
        "same",
        "missing",
        "mixed",
        "index",
        "images",
        "chat",
        "truth",
    ],
)
def test_data_are_refused_before_the_model_is_loaded(
    pairs: Callable[[], Dataset],
    says: str,
    llama_dir: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    pairs().save_to_disk(str(tmp_path / "data"))
    before = sorted(tmp_path.rglob("*"))
    assert says in refused(capsys, llama_dir, tmp_path / "data", "--output_dir", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_data_set_is_refused(
    llama_dir: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "broken.jsonl").write_text('{"chosen": ')

    def sentence(name: Any, *options: str) -> str:
        return refused(capsys, llama_dir, name, "--output_dir", tmp_path / "out", *options)

    assert sentence(tmp_path / "nowhere") == f"DATASET {tmp_path / 'nowhere'} is not a folder."
    assert sentence("typo.jsonl") == "DATASET typo.jsonl is not there."
    assert ".parquet, .jsonl, .json, .csv" in sentence(tmp_path / "notes.txt")
    assert "broken.jsonl cannot be read" in sentence(tmp_path / "broken.jsonl")
    assert "DATASET typo is no folder here, and cannot be read" in sentence("typo")
    assert "is a single file" in sentence(data, "--config_name", "x")
    assert "cannot be read" in sentence(data, "--split", "test")
    stream = learnable().to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
    assert "is no table of examples but a stream" in sentence("user/stream")


def test_targets_and_options_are_refused_first(
    llama_dir: Path, tmp_path: Path, data: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sentence(*options: Any) -> str:
        return refused(capsys, tmp_path / "nowhere", *options)  # which would be noticed next

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    out = ("--output_dir", tmp_path / "out")
    assert sentence(data, "--output_dir", tmp_path / "full").endswith(
        "full is not empty: give another folder."
    )
    assert sentence(data, "--output_dir", data) == f"--output_dir {data} is a file: give a folder."
    assert "lies inside the data" in sentence(tmp_path, *out)
    assert sentence(data, *out, "--plot", "x.pdf") == "--plot x.pdf must end in .png."
    for package, options in (
        ("datasets", []),
        ("peft", ["--adapter", "x"]),
        ("matplotlib", ["--plot", "x.png"]),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert (
                sentence(data, *out, *options) == f"judge needs {package}: pip install 'hf_poprisk[recipes]'."
            )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trl", None)  # pairs alone need it
        assert refused(capsys, llama_dir, data, *out).startswith("judge needs trl: ")
    assert "is not a model (" in sentence(data, *out)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "set CUDA_VISIBLE_DEVICES" in sentence(data, *out)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process" in sentence(data, *out)
    for wrong in (
        ["--max_length", "0"],
        ["--per_device_train_batch_size", "x"],
        ["--dtype", "int8"],
        ["--seed", "1"],
    ):
        with pytest.raises(SystemExit):
            main(["judge", "model", str(data), "--output_dir", str(tmp_path / "out"), *wrong])
        assert wrong[0] in capsys.readouterr().err


def edited(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    model = save_tiny_model(folder, "llama")
    weights = load_file(model / "model.safetensors")
    edit(weights)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return model


def test_models_are_refused(
    llama_dir: Path,
    reward_dir: Path,
    data: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sentence(model: Path, *options: Any) -> str:
        return refused(capsys, model, data, "--output_dir", tmp_path / "out", *options)

    def poison(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][3, 2] = torch.nan

    says = sentence(edited(tmp_path / "nan", poison))
    assert says.endswith("nan are not finite: model.layers.1.mlp.up_proj.weight holds NaN or inf.")
    headless = edited(tmp_path / "headless", lambda weights: weights.pop("lm_head.weight"))
    assert sentence(headless).endswith("it holds no lm_head.weight, which would be random.")
    broken = save_tiny_model(tmp_path / "broken", "llama")
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert "broken cannot be loaded (" in sentence(broken)
    tiny_model().save_pretrained(tmp_path / "mute")
    assert "mute has no tokenizer (" in sentence(tmp_path / "mute")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # the rest is seen before
    assert "llama is not a reward model: it is a LlamaForCausalLM." in sentence(llama_dir, "--reward")
    assert "is a LlamaForSequenceClassification: add --reward" in sentence(reward_dir)
    three = json.loads((reward_dir / "config.json").read_text()) | {
        "id2label": {"0": "a", "1": "b", "2": "c"}
    }
    three["label2id"] = {"a": 0, "b": 1, "c": 2}
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "config.json").write_text(json.dumps(three))
    assert "three is not a reward model: it has 3 labels and not one." in sentence(
        tmp_path / "three", "--reward"
    )
    assert f"--adapter {data.parent} is not a PEFT adapter (" in sentence(llama_dir, "--adapter", data.parent)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("where", ["features", "table"])
def test_an_interrupted_run_leaves_nothing(
    where: str, llama_dir: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    learnable().save_to_disk(str(tmp_path / "data"))
    before = sorted(tmp_path.rglob("*"))
    if where == "features":
        monkeypatch.setattr(mixin, "label_features", stop)
    else:
        monkeypatch.setattr(pq, "write_table", stop)
    with pytest.raises(SystemExit) as stopped:
        main(["judge", str(llama_dir), str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")])
    assert stopped.value.code == 130 and capsys.readouterr().out == ""
    assert sorted(tmp_path.rglob("*")) == before
    assert datasets.is_caching_enabled()


# -- what the command shares with the audit -----------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv"])
def test_single_files(suffix: str, tmp_path: Path) -> None:
    path, rows = tmp_path / f"pairs.{suffix}", learnable()
    {"parquet": rows.to_parquet, "csv": rows.to_csv}.get(suffix, rows.to_json)(path)
    if suffix == "json":
        path.write_text(json.dumps(rows.to_list()))
    assert load_data(str(path)).to_dict() == rows.to_dict()
    assert load_data(str(path), "train[:7]").to_dict() == rows.select(range(7)).to_dict()


@pytest.mark.parametrize("kind", WRITES)
def test_copies_by_an_estimate_that_says_little_take_force(
    kind: str, saved: Path, tmp_path: Path, capsys: Any
) -> None:
    for name, fit, says in (
        (
            "clean",
            replace(FIT, low=0.009, high=0.2),
            "interval that includes zero (0.9% to 20.0%): there may be no mislabeled",
        ),
        ("chance", CHANCE, "would follow an estimate that means little: the model's gradients"),
    ):
        judged = save_run(tmp_path / name, fit=fit)
        argv = (judged, "--dataset", saved, "--write", kind, "--to", tmp_path / f"{name}-copy")
        sentence = refused(capsys, *argv, command="audit")
        assert says in sentence and sentence.endswith("; --force writes it all the same.")
        assert not (tmp_path / f"{name}-copy").exists()
        run(capsys, *argv, "--force", command="audit")
        assert (tmp_path / f"{name}-copy" / "dataset_info.json").is_file()
    sure = save_run(tmp_path / "sure", fit=replace(FIT, low=0.011, high=0.2))
    run(capsys, sure, "--dataset", saved, "--write", kind, "--to", tmp_path / "copy", command="audit")
    assert "--force has no effect" in refused(capsys, sure, "--force", command="audit")


def test_trl_is_imported_by_the_command_alone(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom hf_poprisk.__main__ import main\n"
        "try:\n    main(['judge', sys.argv[1], 'x', '--output_dir', sys.argv[2]])\n"
        "finally:\n    assert 'trl' not in sys.modules"
    )
    argv = [sys.executable, "-c", code, tmp_path / "nowhere", tmp_path / "out"]
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr.startswith("hf-poprisk judge: error: ")
        and done.stderr.count("\n") == 1
    )
