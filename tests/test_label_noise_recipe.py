"""The comparison of label-noise arms: one small cell of every arm, and the table of made-up rows."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import label_noise

SCRIPT = Path(label_noise.__file__)


def test_every_arm_of_a_classification_runs(tmp_path: Path) -> None:
    found = {}
    for arm, spec in label_noise.ARMS.items():
        if not spec.dpo_only:
            found[arm] = label_noise.run_cell(asdict(label_noise.Cell("digits", arm, 0.3, 3e-3, 0, 4)))
    for arm, row in found.items():
        assert 0.5 < row["test_accuracy"] <= 1.0 and row["sizes"]["test"] == 597, arm
        judged = label_noise.ARMS[arm].label_noise != "off"
        assert (row["noise_rate"] is not None) == judged, arm
        assert not judged or row["auroc_suspicion"] > 0.8, arm
    assert found["adamw"]["sizes"]["train"] == 900 and found["adamw-early"]["sizes"]["train"] == 810
    runs = [row["test_accuracy_per_epoch"] for arm, row in found.items() if arm != "adamw-early"]
    assert len({tuple(run) for run in runs}) > 5  # the arms are not the same run


@pytest.mark.parametrize("kind", ["uniform", "class", "group"])
def test_labels_are_spoiled_as_said(kind: str, tmp_path: Path) -> None:
    task = "digits" if kind == "uniform" else f"digits-{kind}"
    setup = label_noise.classification(label_noise.Cell(task, "adamw", 0.2, 1e-3, 1, 1), str(tmp_path))
    x, clean = label_noise.draw(task, 1)["train"]
    labels = np.array([int(row["labels"]) for row in setup.trainer.train_dataset])
    assert np.array_equal(labels != clean, setup.wrong) and setup.wrong.sum() == 180
    step = (labels - clean)[setup.wrong] % 10
    assert (len(set(step)) > 5) == (kind == "uniform")
    spread = [np.square(x[part] - x[part].mean(0)).sum(1).mean() for part in (setup.wrong, ~setup.wrong)]
    assert (spread[0] < 0.8 * spread[1]) == (kind == "group")


def row(arm: str, rate: float, seed: int, validation: float, test: float, **more: Any) -> dict[str, Any]:
    return {
        "task": "digits",
        "arm": arm,
        "noise": 0.3,
        "learning_rate": rate,
        "seed": seed,
        "epochs": 20,
        "validation_accuracy": validation,
        "test_accuracy": test,
        "test_accuracy_per_epoch": [test, test - 0.1],
        "wrong_fitted": 0.5,
        "noise_rate": None,
        "auroc_suspicion": None,
        "auroc_loss_mean": None,
        "seconds_per_step": 0.1,
        "sizes": {"train": 900, "validation": 300, "test": 597},
        "versions": {"torch": "2"},
        **more,
    }


def test_the_table_chooses_by_validation_and_pairs_the_seeds(tmp_path: Path) -> None:
    rows = [row("adamw", rate, seed, 0.5 + rate, 0.6 - rate) for rate in (0.1, 0.2) for seed in (0, 1)]
    rows += [
        row("weight", 0.1, seed, 0.9, 0.5 + 0.01 * seed, noise_rate=0.31, seconds_per_step=0.2)
        for seed in (0, 1)
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"task": "dig')  # a run was killed
    assert label_noise.load_rows(path) == rows
    printed = label_noise.table(rows)
    assert "| adamw | 0.2* | 0.700 | 0.400 ± 0.000 |" in printed
    weight = next(line for line in printed.splitlines() if line.startswith("| weight |"))
    assert "| 0.505 ± 0.005 | +0.105 [+0.041, +0.169] | 0.500 | 0.310 |" in weight and "| 2.00 |" in weight
    assert "Not the same number of learning rates for every arm: adamw 2, weight 1" in printed
    assert "oracle: best epoch on test* | 0.1 | | 0.500" in printed


def test_a_foreign_line_and_senseless_options_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"a": 1}\n')
    monkeypatch.chdir(tmp_path)
    for options, message in (
        (["table", "results.jsonl"], "line 1 of results.jsonl is not of this script"),
        (["run", "--tasks", "digits", "--noise", "0.6"], "--noise must lie in"),
        (["run", "--tasks", "digits", "--arms", "swap"], "the arm swap is for preference pairs"),
        (["run", "--tasks", "digits", "--processes", "0"], "--processes"),
        (["run", "--tasks", "dpo"], "`python scripts/prepare_tiny.py` makes it"),
    ):
        monkeypatch.setattr(sys, "argv", ["label_noise.py", *options])
        with pytest.raises(SystemExit) as stopped:
            label_noise.main()
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and message in printed and printed.count("\n") == 1


def test_the_results_page_is_what_the_command_prints() -> None:
    root = SCRIPT.parent
    rows = label_noise.load_rows(root / "results" / "label_noise.jsonl")
    page = (root / "LABEL_NOISE.md").read_text()
    assert page.partition("\n---\n\n")[2] == label_noise.table(rows) + "\n"


def test_accuracy_is_drawn_against_kl(tmp_path: Path) -> None:
    rows = [
        row(arm, rate, seed, 0.7, 0.8, task="dpo", test_kl_per_token=rate)
        for arm in ("adamw", "swap")
        for rate in (0.1, 0.2)
        for seed in (0, 1)
    ]
    label_noise.frontier(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    with pytest.raises(label_noise.common.RecipeError, match="no two arms with preferences"):
        label_noise.frontier(rows[:4], tmp_path / "b.png")
