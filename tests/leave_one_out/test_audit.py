"""``hf-poprisk audit``: its options, the printed report, and copies of the data."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset, load_dataset

from hf_poprisk.__main__ import main
from hf_poprisk.leave_one_out import INDEX, NoiseFit
from hf_poprisk.leave_one_out.audit import WRITES
from hf_poprisk.leave_one_out.index import take_sample
from leave_one_out.helpers import learnable
from leave_one_out.judged import (
    CHANCE,
    FIT,
    WRONG,
    N,
    command,
    log_odds,
    message,
    pairs,
    posterior,
    refused,
    save_run,
)

OPEN = replace(FIT, high=0.44)


def p_correct() -> np.ndarray:
    return np.array([posterior(float(z)) for z in log_odds()])


def written(capsys: Any, run: Path, data: Path, kind: str, to: Path) -> tuple[str, Dataset]:
    out = command(capsys, run, "--dataset", data, "--write", kind, "--to", to)
    # the source is as it was, and nothing lies about
    assert not list(data.glob("cache*")) and not list(to.parent.glob(".*"))
    return out, load_dataset(str(to), split="train")


# -- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--to", "x"], "--to has no effect without --write."),
        (["--write", "filtered", "--to", "x"], "--write needs --dataset and --to FOLDER."),
        (["--write", "filtered", "--dataset", "x"], "--write needs --dataset and --to FOLDER."),
        (["--force"], "--force has no effect without --write."),
        (["--split", "train"], "--split has no effect without --dataset."),
        (["--config_name", "x"], "--config_name has no effect without --dataset."),
        (["--page", "page.html"], "--page needs --dataset."),
        (["--page", "page.txt", "--dataset", "x"], "--page page.txt must end in .html."),
    ],
)
def test_options_are_refused_before_any_work(
    tmp_path: Path, capsys: Any, options: list[str], says: str
) -> None:
    # the run is not there, and that would be noticed first if anything were read
    assert refused(capsys, tmp_path / "nowhere", *options) == says


def test_targets_are_refused_before_any_work(tmp_path: Path, saved: Path, capsys: Any) -> None:
    write = ["--dataset", saved, "--write", "filtered", "--to"]
    nowhere, file, folder = tmp_path / "nowhere", tmp_path / "file", tmp_path / "x.png"
    file.write_text("mine")
    folder.mkdir()
    (folder / "mine").write_text("")
    assert refused(capsys, nowhere, *write, folder) == f"--to {folder} is not empty: give another folder."
    assert refused(capsys, nowhere, *write, file) == f"--to {file} is a file: give a folder."
    assert f"--to {saved}/new lies inside the data" in refused(capsys, nowhere, *write, saved / "new")
    assert file.read_text() == "mine" and (folder / "mine").is_file()


@pytest.mark.parametrize("wrong", [["--writ", "filtered"], ["--write", "shuffled"], []])
def test_argparse_refuses(run: Path, capsys: Any, wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["audit", str(run), *wrong] if wrong else [])
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


def test_missing_packages_and_an_interruption(
    run: Path, saved: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("sklearn", "datasets", "pyarrow"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            sentence = refused(capsys, run, "--dataset", saved)
            assert f"needs {package}: pip install 'hf_poprisk[recipes]'." in sentence
    for package in ("datasets", "sklearn"):
        monkeypatch.setitem(sys.modules, package, None)
    assert "most suspicious" in command(capsys, run)  # which needs none of these

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_poprisk.leave_one_out.audit.load_run", stop)
    with pytest.raises(SystemExit) as stopped:
        main(["audit", str(run)])
    assert stopped.value.code == 130 and "interrupted" in capsys.readouterr().err


def test_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hf_poprisk", "audit", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"hf-poprisk audit: error: {tmp_path / 'nowhere'} is not a folder.\n"


# -- the report ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fit", "says"),
    [
        (FIT, "Noise rate: 25.0%, 95% interval 15.0% to 33.0%."),
        (
            CHANCE,
            "but do not filter by it: the model's gradients predict labels hardly better than by chance: ",
        ),
        (OPEN, "by it: the pairs leave the noise rate open (0.150 to 0.440): more pairs"),
    ],
)
def test_pairs_that_tell_little_are_named(tmp_path: Path, capsys: Any, fit: NoiseFit, says: str) -> None:
    out = command(capsys, save_run(tmp_path / "run", fit=fit))
    assert says in out and ("Noise rate: open" in out) == (fit is not FIT)
    assert ("Precision at that cut" in out) == (fit is FIT)


def test_report_without_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    below, worst = p_correct() < 0.5, np.argsort(log_odds())[:10]
    assert command(capsys, run).splitlines() == [
        f"{run}: 60 preference pairs",
        "Noise rate: 25.0%, 95% interval 15.0% to 33.0%.",
        f"Labels right with a probability below .5: {below.sum()} of 60 ({below.mean():.1%}).",
        f"Precision at that cut: {1 - p_correct()[below].mean():.0%} expected to be mislabeled.",
        "",
        "The most suspicious:",
        *(f"  {i}, correct with probability {p_correct()[i]:.3f}" for i in worst),
    ]


def test_report_with_truth(tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = command(capsys, save_run(tmp_path / "run", never=(0, 1)), "--dataset", saved)
    seen = np.arange(N) > 1
    below = (p_correct() < 0.5) & seen
    hits = (below & WRONG).sum()
    precision, recall = hits / below.sum(), hits / (WRONG & seen).sum()
    auroc = (log_odds()[seen & ~WRONG][:, None] > log_odds()[seen & WRONG]).mean()
    assert 0 < recall < 1 and auroc < 1  # the example has something to miss
    assert "58 preference pairs (2 more were never judged)" in out
    assert (
        f"Known to be mislabeled (is_flipped): {(WRONG & seen).sum()} of 58. Below .5: precision "
        f"{precision:.1%}, recall {recall:.1%}; AUROC {auroc:.3f}." in out
    )
    worst = int(np.argmin(log_odds()))
    assert f"  {worst}, correct with probability 0.0" in out and ", mislabeled\n" in out
    assert all(f"{name} {worst}\n" in out for name in ("prompt: prompt", "chosen: good", "rejected: bad"))


# -- copies -------------------------------------------------------------------------------------------------


def test_filtered(run: Path, saved: Path, tmp_path: Path, capsys: Any) -> None:
    out, data = written(capsys, run, saved, "filtered", tmp_path / "new" / "to")
    kept = np.flatnonzero(p_correct() >= 0.5).tolist()
    assert data["prompt"][:] == [f"prompt {i}" for i in kept] and data["example_index"][:] == kept
    assert data.remove_columns("example_index").features == pairs().features
    assert 0 < len(kept) < N and f"({N - len(kept)} of 60 rows dropped)" in out


def test_weighted_rows_are_found_by_their_index(tmp_path: Path, saved: Path, capsys: Any) -> None:
    """A row that was not judged, or is not in the run, is right with a probability of one minus the rate."""
    run = save_run(tmp_path / "run", never=(2,))
    (tmp_path / "to").mkdir()  # empty: allowed
    _, data = written(capsys, run, saved, "weighted", tmp_path / "to")
    expected = p_correct()
    expected[2] = 0.75
    np.testing.assert_allclose(data["label_weight"][:], expected, rtol=1e-6)
    assert data.features["label_weight"].dtype == "float32"
    assert data.remove_columns(["label_weight", INDEX])[:] == pairs()[:]
    assert data[INDEX][:] == list(range(N))
    ids = np.arange(N)[::-1].copy() * 3
    run = save_run(tmp_path / "moved", ids=ids)
    order = np.random.default_rng(2).permutation(N)
    more = pairs().add_column(INDEX, ids + 1).select([0])
    data = datasets.concatenate_datasets([pairs().add_column(INDEX, ids).select(order), more])
    data.save_to_disk(tmp_path / "data")
    _, data = written(capsys, run, tmp_path / "data", "weighted", tmp_path / "again")
    np.testing.assert_allclose(data["label_weight"][:], [*p_correct()[order], 0.75], rtol=1e-6)


@pytest.mark.parametrize("scores", [True, False])
def test_reflipped(run: Path, tmp_path: Path, capsys: Any, scores: bool) -> None:
    pairs(scores=scores).save_to_disk(tmp_path / "data")
    out, data = written(capsys, run, tmp_path / "data", "reflipped", tmp_path / "to")
    swapped = [posterior(float(z)) < 0.5 for z in log_odds()]
    assert data["reflipped"][:] == swapped and data.features["reflipped"].dtype == "bool"
    assert f"({sum(swapped)} of 60 rows reversed)" in out
    for i, row in enumerate(data):
        good, bad = (("rejected", "chosen") if swapped[i] else ("chosen", "rejected"))[:2]
        assert (row[good], row[bad], row["prompt"]) == (f"good {i}", f"bad {i}", f"prompt {i}")
        if scores:
            assert (row[f"score_{good}"], row[f"score_{bad}"]) == (i, -i)
        assert row["is_flipped"] == (WRONG[i] != swapped[i])  # the wrong way round now
    assert ("score_chosen" in data.column_names) == scores


def test_reflipped_conversations(run: Path, tmp_path: Path, capsys: Any) -> None:
    chosen = [[message("user", f"q {i}"), message("assistant", f"good {i}")] for i in range(N)]
    rejected = [[message("user", f"q {i}"), message("assistant", f"bad {i}")] for i in range(N)]
    models = {"chosen_model": ["a"] * N, "rejected_model": ["b"] * N, "chosen_by": ["c"] * N}
    source = Dataset.from_dict({"chosen": chosen, "rejected": rejected, **models})
    source.with_format("torch", columns=["chosen_by"]).save_to_disk(tmp_path / "data")
    _, data = written(capsys, run, tmp_path / "data", "reflipped", tmp_path / "to")
    worst, best = int(np.argmin(log_odds())), int(np.argmax(log_odds()))
    assert data[worst]["chosen"] == rejected[worst] and data[worst]["rejected"] == chosen[worst]
    assert data[best]["chosen"] == chosen[best]
    assert [data[worst][f"{name}_model"] for name in ("chosen", "rejected")] == ["b", "a"]
    assert data[worst]["chosen_by"] == "c"
    assert data.remove_columns(["reflipped", INDEX]).features == source.features


def test_what_cannot_be_written(run: Path, saved: Path, tmp_path: Path, capsys: Any) -> None:
    def sentence(kind: str, run: Path = run, data: Path = saved) -> str:
        found = refused(capsys, run, "--dataset", data, "--write", kind, "--to", tmp_path / "to")
        assert not (tmp_path / "to").exists()
        return found

    hopeless = save_run(tmp_path / "hopeless", np.full(N, -9.0))
    assert "would drop every row" in sentence("filtered", hopeless)
    ambiguous = save_run(tmp_path / "ambiguous", preferences=False, fit=replace(FIT, log_likelihood=-0.65))
    assert re.search("means little: .*, so the ambiguous look wrong", sentence("weighted", ambiguous))
    tokens = Dataset.from_dict({"input_ids": [[i] for i in range(N)], "labels": [0] * N})
    other = save_run(tmp_path / "other", sample=take_sample(tokens, np.arange(N)))
    assert "was trained on (input_ids, labels): nothing tells" in sentence("filtered", other)
    assert "was trained on (input_ids, labels): nothing tells" in command(capsys, other, "--dataset", saved)
    assert "nothing tells" not in command(capsys, run, "--dataset", saved)
    classes = save_run(tmp_path / "classes", preferences=False)
    assert "reflipped is for preference pairs" in sentence("reflipped", classes)
    pairs(scores=False).remove_columns("rejected").save_to_disk(tmp_path / "half")
    assert "with columns chosen and rejected" in sentence("reflipped", data=tmp_path / "half")
    for kind, column, says in (
        ("weighted", "label_weight", "adds a column label_weight, which the data have already"),
        ("reflipped", "reflipped", "adds a column reflipped, which the data have already"),
        ("reflipped", "margin", "cannot turn the column margin round"),
    ):
        pairs().add_column(column, [0] * N).save_to_disk(tmp_path / column)
        assert says in sentence(kind, data=tmp_path / column)


@pytest.mark.parametrize("kind", WRITES)
def test_nothing_is_left_half_written(
    run: Path, saved: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def full(self: Dataset, path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Dataset, "to_parquet", full)
    sentence = refused(capsys, run, "--dataset", saved, "--write", kind, "--to", tmp_path / "to")
    assert "No space left on device" in sentence
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize(
    ("fit", "says"),
    [
        (
            replace(FIT, low=0.009, high=0.2),
            "interval that includes zero (0.9% to 20.0%): there may be no mislabeled",
        ),
        (CHANCE, "follow an estimate that means little: the model's gradients predict labels h"),
        (OPEN, "that means little: the pairs leave the noise rate open"),
        (replace(FIT, low=0.011, high=0.2), None),
    ],
)
def test_copies_by_an_estimate_that_says_little_take_force(
    fit: NoiseFit, says: str | None, kind: str, saved: Path, tmp_path: Path, capsys: Any
) -> None:
    judged, copy = save_run(tmp_path / "run", fit=fit), tmp_path / "copy"
    argv = (judged, "--dataset", saved, "--write", kind, "--to", copy)
    if says is not None:
        sentence = refused(capsys, *argv)
        assert says in sentence and sentence.endswith("; --force writes it all the same.")
        assert not copy.exists()
    command(capsys, *argv, *["--force"] * (says is not None))
    assert (copy / "train.parquet").is_file()


@pytest.mark.parametrize("kind", WRITES)
def test_judged_audited_and_trained_on(kind: str, llama_dir: Path, tmp_path: Path, capsys: Any) -> None:
    """By the three commands, one after the other."""
    data, judged, copy = (tmp_path / name for name in ("pairs.parquet", "judged", "copy"))
    learnable().to_parquet(data)
    command(capsys, llama_dir, data, "--output_dir", judged, name="judge")
    command(capsys, judged, "--dataset", data, "--write", kind, "--to", copy, "--force")
    options = {
        "model_name_or_path": llama_dir,
        "dataset_name": copy,
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "use_cpu": True,
        "report_to": "none",
    }
    if kind == "weighted":
        options["poprisk_weight_column"] = "label_weight"
    command(capsys, *(f"--{name}={value}" for name, value in options.items()), name="dpo")
    assert (tmp_path / "out" / "model.safetensors").is_file()
