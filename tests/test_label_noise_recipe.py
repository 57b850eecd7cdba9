"""The comparison of label-noise arms: small cells of classes and of pairs, and the table of made-up rows."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, concatenate_datasets
from models import preferences as pairs
from models import save_tiny_model

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))

import common  # noqa: E402
import controls  # noqa: E402
import dpo  # noqa: E402
import label_noise  # noqa: E402
import sweep  # noqa: E402
from noisy_labels import arms, classification, preferences, runs, words  # noqa: E402
from noisy_labels.arms import ARMS  # noqa: E402
from noisy_labels.cells import Cell, load_rows  # noqa: E402
from noisy_labels.figure import frontier  # noqa: E402
from noisy_labels.runs import run_cell  # noqa: E402
from noisy_labels.table import AIMS, aims, tables  # noqa: E402

from hf_poprisk.leave_one_out import LabelNoise  # noqa: E402
from hf_poprisk.leave_one_out.judge import RULE  # noqa: E402


def test_every_arm_of_a_classification_runs(tmp_path: Path) -> None:
    found = {}
    for arm, spec in ARMS.items():
        if not spec.dpo_only:
            found[arm] = run_cell(asdict(Cell("digits", arm, 0.3, 3e-3, 0, 4)))
    for arm, row in found.items():
        assert 0.5 < row["test_accuracy"] <= 1.0 and row["sizes"]["test"] == 597, arm
        judged = ARMS[arm].label_noise != "off"
        assert (row["noise_rate"] is not None) == judged, arm
        assert not judged or row["auroc_suspicion"] > 0.8, arm
    assert found["adamw"]["sizes"]["train"] == 900 and found["adamw-early"]["sizes"]["train"] == 810
    most, plain = found["right-only"], found["adamw"]  # what it is told changes what is learned
    assert most["wrong_fitted"] < 0.6 * plain["wrong_fitted"], (most["wrong_fitted"], plain["wrong_fitted"])
    runs = [row["test_accuracy_per_epoch"] for arm, row in found.items() if ARMS[arm].early is None]
    assert len({tuple(run) for run in runs}) > 5  # the arms are not the same run


def test_early_stopping_takes_the_epoch_that_its_split_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([(0.5, 1.0), (0.7, 1.2), (0.6, 0.8)])  # accuracy and loss, epoch by epoch
    prepare = classification.prepare

    def made_up(cell: Cell, folder: str) -> Any:
        setup = prepare(cell, folder)
        x = np.stack([row["x"] for row in setup.trainer.train_dataset])
        every, clean = classification.draw("digits", 0)["train"]
        apart = [i for i, row in enumerate(every) if not (x == row).all(1).any()]
        noisy = classification.spoil(every, clean, cell)[0][apart]
        assert len(x) == 810 and len(apart) == 90 and 20 < (noisy != clean[apart]).sum() < 60
        score, true = setup.score, setup.score("held")["accuracy"]
        hits = setup.trainer.model(torch.from_numpy(every[apart]), torch.from_numpy(noisy))["logits"].argmax(
            1
        )
        assert true == pytest.approx((hits.numpy() == noisy).mean())
        setup.score = lambda name: (
            dict(zip(("accuracy", "loss"), next(held), strict=True)) if name == "held" else score(name)
        )
        return setup

    monkeypatch.setattr(classification, "prepare", made_up)
    row = run_cell(asdict(Cell("digits", "adamw-early", 0.4, 1e-3, 0, 3)))
    assert row["reported_epoch"] == 2 and row["test_accuracy"] == row["test_accuracy_per_epoch"][1]
    held = iter([(0.5, 1.0), (0.7, 1.2), (0.6, 0.8)])
    row = run_cell(asdict(Cell("digits", "adamw-early-loss", 0.4, 1e-3, 0, 3)))
    assert row["reported_epoch"] == 3 and row["test_accuracy"] == row["test_accuracy_per_epoch"][2]


def test_controls_of_judging_are_what_they_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.tensor([0.1, 0.2, 0.3])
    visit, judge = SimpleNamespace(rows=torch.arange(3)), object.__new__(arms.ShuffledWeights)
    plain = lambda self, visit, *_: setattr(visit, "weight", weights)  # noqa: E731
    monkeypatch.setattr(LabelNoise, "sample_weight", plain)
    assert judge.sample_weight(visit, None, 2).tolist() == pytest.approx([0.3, 0.1, 0.2])

    told = object.__new__(arms.DropTold)
    told.told, told.table = 0.4, SimpleNamespace()
    losses = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3])
    for visits, kept in ((0, [1, 1, 1]), (1, [1, 0, 1])):  # the two largest losses of five go
        told.table.visits = torch.full([5], visits)
        told.table.columns = {"loss_mean": losses}
        assert told.sample_weight(visit, None, 2).tolist() == kept
        visit.rows = torch.tensor([0, 1, 4])
    monkeypatch.undo()

    trainer = classification.prepare(Cell("digits", "weight-C0", 0.3, 1e-2, 0, 3), str(tmp_path)).trainer
    judge, booked = trainer._label_noise, []
    plain = judge.booked
    judge.booked = lambda *args: (booked.append(plain(*args)), booked[-1])[1]
    trainer.train()
    _, z, log_odds, *_ = torch.cat(booked).unbind(1)
    assert torch.equal(z, log_odds)


def test_a_neighbour_takes_two(recipe: Path, tmp_path: Path) -> None:
    alone = tmp_path / "one.yaml"
    settings = yaml.safe_load(recipe.read_text())
    settings |= {"per_device_train_batch_size": 1, "output_dir": str(tmp_path / "out")}
    alone.write_text(yaml.safe_dump(settings))
    with pytest.raises(common.RecipeError, match="two examples or more in every forward"):
        run_cell(Cell(str(alone), "weight-shuffled", 0.3, 1e-3, 0, 1).place)


def test_a_mask_has_the_density_of_its_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decide, written = controls.RandomMaskAdamW._decide, []

    def watched(self: Any, grad: torch.Tensor, sq_sum: torch.Tensor, num_examples: int) -> torch.Tensor:
        sums = decide(self, grad, sq_sum, num_examples)
        written.append(sq_sum.mean().item())
        return sums

    monkeypatch.setattr(controls.RandomMaskAdamW, "_decide", watched)
    density = {}
    for arm in ("random-mask", "random-mask-soft"):
        written.clear()
        classification.prepare(Cell("digits", arm, 0.3, 1e-3, 0, 1), str(tmp_path)).trainer.train()
        density[arm] = np.mean(written)
    # of noise the gates open 0.32 and 0.16, and early in training there is signal
    assert 0.32 < density["random-mask"] < 0.5 and 0.16 < density["random-mask-soft"] < 0.28


def test_losses_that_are_told_the_share_are_the_published_ones(recipe: Path, tmp_path: Path) -> None:
    noise, found = 0.3, {}
    for arm in ("adamw", "robust", "conservative", "ipo"):
        cell = Cell(str(recipe), arm, noise, 1e-3, 0, 1)
        trainer = preferences.prepare(cell, str(tmp_path / arm)).trainer
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in trainer.model.parameters():
                weight.add_(weight.std() * torch.randn_like(weight))
            batch = trainer.data_collator([trainer.train_dataset[0]])
            loss = trainer.compute_loss(trainer.model.eval(), batch).item()
        found[arm] = loss, trainer._metrics["eval"]["rewards/margins"][0]
    z = found["adamw"][1]
    assert abs(z) > 0.05 and all(margin == pytest.approx(z) for _, margin in found.values())
    right, wrong = np.log1p(np.exp(-z)), np.log1p(np.exp(z))  # -log σ(z), -log σ(-z)
    assert found["adamw"][0] == pytest.approx(right, rel=1e-4)
    assert found["robust"][0] == pytest.approx(
        ((1 - noise) * right - noise * wrong) / (1 - 2 * noise), rel=1e-4
    )
    assert found["conservative"][0] == pytest.approx((1 - noise) * right + noise * wrong, rel=1e-4)
    assert abs(found["ipo"][0] - right) > 1  # (z / (β tokens) - 1 / 2β)², about 25


@pytest.mark.parametrize("kind", ["uniform", "class", "group"])
def test_labels_are_spoiled_as_said(kind: str, tmp_path: Path) -> None:
    task = "digits" if kind == "uniform" else f"digits-{kind}"
    setup = classification.prepare(Cell(task, "adamw", 0.2, 1e-3, 1, 1), str(tmp_path))
    x, clean = classification.draw(task, 1)["train"]
    labels = np.array([int(row["labels"]) for row in setup.trainer.train_dataset])
    assert np.array_equal(labels != clean, setup.wrong) and setup.wrong.sum() == 180
    step = (labels - clean)[setup.wrong] % 10
    assert (len(set(step)) > 5) == (kind == "uniform")
    spread = [np.square(x[part] - x[part].mean(0)).sum(1).mean() for part in (setup.wrong, ~setup.wrong)]
    assert (spread[0] < 0.8 * spread[1]) == (kind == "group")


def test_completions_are_put_out_of_order() -> None:
    text = " one two three four five six seven eight"
    prose = Dataset.from_dict(
        {"prompt": ["a"] * 40, "chosen": [text] * 39 + [" no no"], "topic": [f"{i % 4}" for i in range(40)]}
    )
    data = words.easier(prose, 0.5, 3)
    assert len(data) == 39 and abs(sum(data["tie"]) - 20) <= 1  # of one word twice nothing can be made
    for row in data:
        before, after = text.split(" "), row["rejected"].split(" ")
        moved = [a != b for a, b in zip(before, after, strict=True)]
        assert sorted(before) == sorted(after) and not moved[0]
        assert sum(moved) == (2 if row["tie"] else words.EXCHANGED), row
        assert not row["tie"] or moved[moved.index(True) + 1]
    assert (
        words.easier(prose, 0.5, 3)["rejected"] == data["rejected"] != words.easier(prose, 0.5, 4)["rejected"]
    )

    wrong = words.wrong_of(data, "ties", 0.2, 3)
    assert wrong.sum() == 8 and all(np.array(data["tie"])[wrong])
    assert not np.array_equal(wrong, words.wrong_of(data, "ties", 0.2, 4))
    wrong = words.wrong_of(data, "group", 0.25, 3)
    topics = np.array(data["topic"])
    assert wrong.sum() == 10 and len(set(topics[wrong])) == 1 and (topics == topics[wrong][0]).sum() == 10


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe for DPO as one may have it: a stock optimizer, no validation split, two prompts too long."""
    save_tiny_model(tmp_path / "model", "llama", tied=True)
    (tmp_path / "data").mkdir()
    for split, data in {"train": train_pairs(), "test": pairs(6, 200)}.items():
        data.to_parquet(tmp_path / "data" / f"{split}.parquet")
    return rewritten(
        RECIPES / "tiny/dpo/adamw.yaml",
        tmp_path / "recipe.yaml",
        model_name_or_path=str(tmp_path / "model"),
        attn_implementation="eager",
        dataset_name=str(tmp_path / "data"),
        dataset_validation_split="",
        max_length=64,
        num_train_epochs=2,
        push_to_hub=True,
        output_dir=str(tmp_path / "out"),
    )


def train_pairs() -> Dataset:
    """42 pairs that all differ, the last two with prompts longer than the recipe's ``max_length``."""
    long = pairs(2, 300).map(lambda row: {"prompt": " ".join([row["prompt"]] * 40)})
    every = concatenate_datasets([pairs(40), long])
    return every.map(
        lambda row, i: {"prompt": f"{i} {row['prompt']}", "chosen": f"{row['chosen']} {i}"}, with_indices=True
    )


def rewritten(path: Path, to: Path, **changed: Any) -> Path:
    to.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changed))
    return to


def asked(monkeypatch: pytest.MonkeyPatch, *argv: Any) -> list[dict[str, Any]]:
    """The cells that a command line asks for; the program ends before they run."""
    cells: list[dict[str, Any]] = []
    monkeypatch.setattr(label_noise, "run_cells", lambda found, *args, **kwargs: cells.extend(found))
    monkeypatch.setattr(sys, "argv", ["label_noise.py", "run", *map(str, argv)])
    with pytest.raises(SystemExit):
        label_noise.main()
    return cells


def test_a_recipe_is_a_task(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--arms", "adamw-early", "swap", "--learning_rates", "1e-3", "--noise", "0.3", "--seeds", "0"]
    cells = asked(monkeypatch, "--tasks", recipe, *options)
    place = {"task": str(recipe), "noise": 0.3, "learning_rate": 1e-3, "seed": 0, "epochs": 2}
    assert cells == [place | {"arm": "adamw-early", "rule": None}, place | {"arm": "swap", "rule": RULE}]
    assert not (recipe.parent / "out").exists()
    cells = asked(monkeypatch, "--tasks", recipe, *options, "--epochs", 1)
    rows = [cell | run_cell(cell) | {"versions": {"torch": "2"}} for cell in cells]
    sizes = {"train": 35, "validation": 5, "test": 6, "wrong": 11}  # of 42, 5 and two that are too long
    assert [row["sizes"] for row in rows] == [sizes | {"train": 31, "wrong": 9, "held": 4}, sizes]
    assert all(row["test_kl_per_token"] > 0 and row["reported_epoch"] == 1 for row in rows)
    printed = tables(rows)
    assert f"label_noise.py run --tasks {recipe} --arms adamw-early swap --noise 0.3 --learning" in printed
    assert "n = 35 training examples, 5 validation, 6 test; 1 epochs; 1 seeds; torch 2." in printed
    assert "| margin | KL per token |" in printed


def test_a_cell_is_a_run_of_the_recipe(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = {"optim": "poprisk_adamw", "poprisk_gate": "hard", "dataset_validation_split": "test"}
    path = rewritten(recipe, tmp_path / "hard.yaml", push_to_hub=False, **gate)
    monkeypatch.setattr(dpo, "MAX_FLIPPED_EVAL", 5)
    row = run_cell(asdict(Cell(str(path), "hard", 0.3, 2e-3, 3, 2)))
    argv = ["--learning_rate", "2e-3", "--seed", "3", "--flip_seed", "3", "--save_strategy", "no"]
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--config", str(path), *argv])
    dpo.main()
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["scores"]
    found = {name: row[f"test_{name}"] for name in ("accuracy", "margin", "kl_per_token")}
    assert found == {name: scores["test"][name] for name in found}
    assert row["validation_accuracy"] == scores["validation"]["accuracy"]
    assert row["wrong_fitted"] == scores["flipped"]["accuracy"] and row["sizes"]["wrong"] == 5


def test_validation_pairs_are_set_apart_with_their_labels_as_they_are(recipe: Path, tmp_path: Path) -> None:
    clean, drawn = {row["prompt"]: row["chosen"] for row in train_pairs()}, []
    for seed in (0, 1):
        cell = Cell(str(recipe), "hard", 0.45, 1e-3, seed, 1)
        trainer = preferences.prepare(cell, str(tmp_path / "run")).trainer
        assert trainer.args.optim == "poprisk_adamw" and not trainer.args.push_to_hub
        assert trainer.model.config._attn_implementation == "eager"
        data = {"train": trainer.train_dataset, **trainer.eval_dataset}
        assert len(data.pop("test")) == 6
        prompts = {name: {row["prompt"] for row in part} for name, part in data.items()}
        assert not prompts["train"] & prompts["validation"] and prompts["wrong"] < prompts["train"]
        kept = {name: {row["prompt"] for row in part if is_clean(row, clean)} for name, part in data.items()}
        assert kept["validation"] == prompts["validation"] and not kept["wrong"]
        assert kept["train"] == prompts["train"] - prompts["wrong"]
        drawn.append(prompts["validation"])
    assert drawn[0] != drawn[1]


def is_clean(row: dict[str, str], clean: dict[str, str]) -> bool:
    return row["chosen"].removesuffix("<|end|>") == clean[row["prompt"]]


def test_pairs_that_are_too_long_are_not_waited_for(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell(str(recipe), "drop-told", 0.3, 3e-3, 0, 2)
    trainer = preferences.prepare(cell, str(tmp_path / "run")).trainer
    trainer.train()
    table = trainer._label_noise.table
    assert sorted(table.visits.tolist()) == [0] * 2 + [2] * 35 and (table.columns["weight"] == 0).sum() == 11
    monkeypatch.setattr(runs, "roc_auc_score", lambda wrong, score: len(wrong))
    assert run_cell(asdict(cell))["auroc_loss_mean"] == 35


def row(arm: str, rate: float, seed: int, validation: float, test: float, **more: Any) -> dict[str, Any]:
    return {
        "task": "digits",
        "arm": arm,
        "noise": 0.3,
        "learning_rate": rate,
        "seed": seed,
        "epochs": 20,
        "rule": None if arm == "adamw" else RULE,
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
    assert load_rows(path) == rows
    printed = tables(rows)
    assert "| adamw | 0.2* | 0.700 | 0.400 ± 0.000 |" in printed
    weight = next(line for line in printed.splitlines() if line.startswith("| weight |"))
    assert "| 0.505 ± 0.005 | +0.105 [+0.041, +0.169] | 0.500 | 0.310 |" in weight and "| 2.00 |" in weight
    assert "Not the same number of learning rates for every arm: adamw 2, weight 1" in printed
    assert "oracle: best epoch on test* | 0.1 | | 0.500" in printed
    assert "| adamw | 0.500 | 0.400 |" in printed  # at each rate
    assert "| weight | 0.505, +0.005 [-0.059, +0.069] | – |" in printed
    assert "earlier rule" not in printed
    rows[-1]["rule"] = RULE - 1
    assert "**The share estimated by an earlier rule: weight at 0.1.**" in tables(rows)


def test_a_run_by_an_earlier_rule_is_run_again_and_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--arms", "adamw", "weight", "--learning_rates", "0.1", "--noise", "0.3", "--seeds", "0"]
    new, rows = asked(monkeypatch, "--tasks", "digits", *options), []
    assert [cell["rule"] for cell in new] == [None, RULE]
    for cell in new:
        old = row(cell["arm"], 0.1, 0, 0.5, 0.5)
        rows += [old | cell, old | cell | {"rule": cell["rule"] and RULE - 1}]
    path, names = tmp_path / "results.jsonl", list(new[0])
    path.write_text("".join(json.dumps(r) + "\n" for r in rows[1::2]))
    left = {sweep.key(cell, names) for cell in new} - {sweep.key(r, names) for r in rows[1::2]}
    assert left == {sweep.key(new[1], names)}
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert load_rows(path) == rows[::2]


def test_weight_is_held_against_what_it_should_beat() -> None:
    rows = [row("adamw", rate, seed, 0.5 + rate, 0.6 - rate) for rate in (0.1, 0.2) for seed in (0, 1)]
    rows += [row("drop-told", 0.1, seed, 0.9, 0.45) for seed in (0, 1)]
    rows += [
        row("weight", 0.2, seed, 0.9, 0.39 + 0.02 * seed, noise_rate=0.3 + seed, auroc_suspicion=0.9 + seed)
        for seed in (0, 1)
    ]
    rows += [row("adamw", 0.1, 0, 0.5, 0.6, noise=0.0)]  # beside nothing
    header, _, *lines = aims(rows).splitlines()
    assert header == f"| {AIMS} |" and len(lines) == 1
    start = ["digits", "30 %", "2", "0.400", "0.400", "+0.000 [-0.127, +0.127]", "1"]
    rest = ["-0.100 [-0.227, +0.027]", "-0.050 [-0.177, +0.077]", "+0.000 to +0.000", "0.30 to 1.30", "0.900"]
    assert lines[0] == f"| {' | '.join([*start, *rest])} |"
    only = [row("adamw", 0.1, 0, 0.5, 0.6), row("weight", 0.2, 0, 0.9, 0.7, noise_rate=0.3)]
    assert "| 0.600 | 0.700 | +0.100 | 1 | +0.100 | – | – | 0.30 to 0.30 | – |" in aims(only)


def test_a_foreign_line_and_senseless_options_are_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(label_noise, "run_cells", lambda *args, **kwargs: pytest.fail("it began"))
    Path("results.jsonl").write_text('{"a": 1}\n')
    Path("empty.jsonl").touch()
    for name, changed in {
        "alone": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
        "half": {"num_train_epochs": 0.5},
        "key": {"poprisk_gaet": "soft"},
        "model": {"model_name_or_path": "./nowhere"},
        "data": {"dataset_name": "./nowhere"},
        "steps": {"max_steps": 3},
    }.items():
        rewritten(recipe, Path(f"{name}.yaml"), **changed)
    given = ("--learning_rates", "1e-3")
    for options, message in (
        (["table", "results.jsonl"], "line 1 of results.jsonl is not of this script"),
        (["table", "empty.jsonl"], "holds no finished run"),
        (["run", "--tasks", "digits", "--noise", "0.6"], "--noise must lie in"),
        (["run", "--tasks", "digits", "--arms", "swap"], "the arm swap is for preference pairs"),
        (["run", "--tasks", "digits", "--processes", "0"], "--processes"),
        (["run", "--tasks", "digits", "--epochs", "0"], "--epochs must be at least 1"),
        (["run", "--tasks", "dpo"], "`python scripts/prepare_tiny.py` makes it"),
        (["run", "--tasks", "dpo-lora"], "`python scripts/prepare_tiny.py` makes it"),
        (["run", "--tasks", "digit"], "--tasks digit is neither a task nor a YAML file"),
        (["run", "--tasks", "nowhere.yaml", *given], "--tasks nowhere.yaml is neither"),
        (["run", "--tasks", "recipe.yaml"], "--learning_rates is missing: recipe.yaml has no grid"),
        (["run", "--tasks", "half.yaml", *given], "--epochs is missing: half.yaml has 0.5"),
        (["run", "--tasks", "key.yaml", *given], "poprisk_gaet"),
        (["run", "--tasks", "steps.yaml", *given], "max_steps of steps.yaml has no place here"),
        (["run", "--tasks", "model.yaml", *given], "model_name_or_path=./nowhere is not a folder"),
        (["run", "--tasks", "data.yaml", *given], "dataset_name=./nowhere is not a folder"),
        (["run", "--tasks", "alone.yaml", *given], "leaves nothing to hold out"),
    ):
        monkeypatch.setattr(sys, "argv", ["label_noise.py", *options])
        with pytest.raises(SystemExit) as stopped:
            label_noise.main()
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and message in printed and printed.count("\n") == 1, options


def test_accuracy_is_drawn_against_kl(tmp_path: Path) -> None:
    rows = [
        row(arm, rate, seed, 0.7, 0.8, task="dpo", test_kl_per_token=rate)
        for arm in ("adamw", "swap")
        for rate in (0.1, 0.2)
        for seed in (0, 1)
    ]
    frontier(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    with pytest.raises(common.RecipeError, match="no two arms with preferences"):
        frontier(rows[:4], tmp_path / "b.png")
