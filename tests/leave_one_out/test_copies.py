"""Filtered, weighted and reversed copies of the data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset, load_from_disk

from hf_poprisk.leave_one_out import INDEX
from hf_poprisk.leave_one_out.audit import WRITES
from hf_poprisk.leave_one_out.index import take_sample
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


def written(capsys: Any, run: Path, data: Path, kind: str, to: Path) -> tuple[str, Dataset]:
    out = command(capsys, run, "--dataset", data, "--write", kind, "--to", to)
    # the source is as it was, and nothing lies about
    assert not list(data.glob("cache*")) and not list(to.parent.glob(".*"))
    return out, load_from_disk(str(to))


def test_filtered(run: Path, saved: Path, tmp_path: Path, capsys: Any) -> None:
    out, data = written(capsys, run, saved, "filtered", tmp_path / "new" / "to")
    kept = [i for i, z in enumerate(log_odds()) if posterior(float(z)) >= 0.5]
    assert data["prompt"][:] == [f"prompt {i}" for i in kept] and data["example_index"][:] == kept
    assert data.remove_columns("example_index").features == pairs().features
    assert 0 < len(kept) < N and f"({N - len(kept)} of 60 rows dropped)" in out


def test_weighted(tmp_path: Path, saved: Path, capsys: Any) -> None:
    run = save_run(tmp_path / "run", never=(2,))
    (tmp_path / "to").mkdir()  # empty: allowed
    _, data = written(capsys, run, saved, "weighted", tmp_path / "to")
    expected = [posterior(float(z)) for z in log_odds()]
    expected[2] = 0.75
    np.testing.assert_allclose(data["label_weight"][:], expected, rtol=1e-6)
    assert data.features["label_weight"].dtype == "float32"
    assert data.remove_columns(["label_weight", INDEX])[:] == pairs()[:]
    assert data[INDEX][:] == list(range(N))


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


def test_written_rows_are_found_by_their_index(tmp_path: Path, capsys: Any) -> None:
    ids = np.arange(N)[::-1].copy() * 3
    run = save_run(tmp_path / "run", ids=ids)
    order = np.random.default_rng(2).permutation(N)
    more = pairs().add_column(INDEX, ids + 1).select([0])
    data = datasets.concatenate_datasets([pairs().add_column(INDEX, ids).select(order), more])
    data.save_to_disk(tmp_path / "data")
    _, data = written(capsys, run, tmp_path / "data", "weighted", tmp_path / "to")
    expected = [posterior(float(log_odds()[i])) for i in order] + [0.75]
    np.testing.assert_allclose(data["label_weight"][:], expected, rtol=1e-6)


def test_what_cannot_be_written(run: Path, saved: Path, tmp_path: Path, capsys: Any) -> None:
    def sentence(kind: str, run: Path = run, data: Path = saved) -> str:
        found = refused(capsys, run, "--dataset", data, "--write", kind, "--to", tmp_path / "to")
        assert not (tmp_path / "to").exists()
        return found

    classes = save_run(tmp_path / "classes", preferences=False)
    assert "reflipped is for preference pairs" in sentence("reflipped", classes)
    hopeless = save_run(tmp_path / "hopeless", np.full(N, -9.0))
    assert "would drop every row" in sentence("filtered", hopeless)
    pairs(scores=False).remove_columns("rejected").save_to_disk(tmp_path / "half")
    assert "with columns chosen and rejected" in sentence("reflipped", data=tmp_path / "half")
    pairs().add_column("margin", [1.0] * N).save_to_disk(tmp_path / "margin")
    assert "cannot turn the column margin round" in sentence("reflipped", data=tmp_path / "margin")
    ambiguous = save_run(tmp_path / "ambiguous", preferences=False, fit=replace(FIT, log_likelihood=-0.65))
    assert (
        "means little: " in (said := sentence("weighted", ambiguous)) and "the ambiguous look wrong" in said
    )
    tokens = Dataset.from_dict({"input_ids": [[i] for i in range(N)], "labels": [0] * N})
    other = save_run(tmp_path / "other", sample=take_sample(tokens, np.arange(N)))
    assert "was trained on (input_ids, labels): nothing tells" in sentence("filtered", other)
    for kind, column in (("weighted", "label_weight"), ("reflipped", "reflipped")):
        pairs().add_column(column, [0] * N).save_to_disk(tmp_path / column)
        assert f"adds a column {column}, which the data have already" in sentence(
            kind, data=tmp_path / column
        )


@pytest.mark.parametrize("kind", WRITES)
def test_nothing_is_left_half_written(
    run: Path, saved: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def full(self: Dataset, path: str) -> None:
        Path(path).mkdir()
        Path(path, "half").write_text("")
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Dataset, "save_to_disk", full)
    sentence = refused(capsys, run, "--dataset", saved, "--write", kind, "--to", tmp_path / "to")
    assert "No space left on device" in sentence
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", WRITES)
def test_copies_by_an_estimate_that_says_little_take_force(
    kind: str, saved: Path, tmp_path: Path, capsys: Any
) -> None:
    for name, options, says in (
        (
            "clean",
            {"fit": replace(FIT, low=0.009, high=0.2)},
            "interval that includes zero (0.9% to 20.0%): there may be no mislabeled",
        ),
        (
            "chance",
            {"fit": CHANCE},
            "follow an estimate that means little: the model's gradients predict labels h",
        ),
        ("open", {"fit": replace(FIT, high=0.44)}, "that means little: the pairs leave the noise rate open"),
    ):
        judged = save_run(tmp_path / name, **options)
        argv = (judged, "--dataset", saved, "--write", kind, "--to", tmp_path / f"{name}-copy")
        sentence = refused(capsys, *argv)
        assert says in sentence and sentence.endswith("; --force writes it all the same.")
        assert not (tmp_path / f"{name}-copy").exists()
        command(capsys, *argv, "--force")
        assert (tmp_path / f"{name}-copy" / "dataset_info.json").is_file()
    sure = save_run(tmp_path / "sure", fit=replace(FIT, low=0.011, high=0.2))
    command(capsys, sure, "--dataset", saved, "--write", kind, "--to", tmp_path / "copy")
