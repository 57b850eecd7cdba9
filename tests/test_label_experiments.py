"""The experiments on mislabeled examples: small cells of classes and of pairs, the arms and controls."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from datasets import Dataset, concatenate_datasets
from models import preferences, save_tiny_model

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path[:0] = [str(RECIPES), str(RECIPES / "experiments")]

import common  # noqa: E402
import dpo  # noqa: E402
import labels_arms  # noqa: E402
import labels_classes  # noqa: E402
import labels_judged  # noqa: E402
import labels_pairs  # noqa: E402
import labels_tables  # noqa: E402
import run  # noqa: E402

from hf_poprisk.leave_one_out import ExampleTable  # noqa: E402

CLASSES, PAIRS = labels_classes.EXPERIMENT, labels_pairs.EXPERIMENT


def cell(experiment: Any, data: Any, arm: str, noise: float, rate: float, seed: int, epochs: int) -> Any:
    """The options of a cell, for a training of so many epochs."""
    place = {"arm": arm, "data": str(data), "noise": noise, "learning_rate": rate, "seed": seed}
    return experiment.options(place) | {"epochs": epochs}


def test_every_arm_of_a_classification_runs(tmp_path: Path) -> None:
    found = {arm: CLASSES.run(cell(CLASSES, "digits", arm, 0.3, 3e-3, 0, 4)) for arm in CLASSES.arms}
    for arm, row in found.items():
        assert 0.5 < row["test_accuracy"] <= row["test_accuracy_best"] <= 1.0, arm
        judged = "poprisk_label_noise" in CLASSES.arms[arm]
        assert (row["noise_rate"] is not None) == judged, arm
        assert not judged or row["auroc_suspicion"] > 0.8, arm
    fitted = {arm: row["mislabeled_fitted"] for arm, row in found.items()}
    assert fitted["right-only"] < 0.6 * fitted["adamw"]  # what it is told changes what is learned
    scores = {arm: (row["test_accuracy"], fitted[arm]) for arm, row in found.items()}
    assert len(set(scores.values())) > 8  # the arms are not the same run
    assert scores["hard"] != scores["random-mask"] and scores["soft"] != scores["random-mask-soft"]


@pytest.mark.parametrize(("arm", "epoch"), [("adamw-early", 1), ("adamw-early-loss", 2)])
def test_early_stopping_takes_the_epoch_that_its_split_prefers(
    arm: str, epoch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [{"accuracy": a, "loss": b} for a, b in ((0.5, 1.0), (0.7, 1.2), (0.6, 0.8))]  # epoch by epoch
    tested: list[float] = []
    prepare = labels_classes.prepare

    def made_up(cell: Any, folder: str) -> Any:
        setup = prepare(cell, folder)
        x = np.stack([row["x"] for row in setup.trainer.train_dataset])
        every, clean = labels_classes.draw("digits", 0)["train"]
        apart = [i for i, row in enumerate(every) if not (x == row).all(1).any()]
        noisy = labels_classes.spoil(every, clean, cell)[0][apart]
        assert len(x) == 810 and len(apart) == 90 and 20 < (noisy != clean[apart]).sum() < 60
        score, true = setup.score, setup.score("held")["accuracy"]
        logits = setup.trainer.model(torch.from_numpy(every[apart]), torch.from_numpy(noisy))["logits"]
        assert true == pytest.approx((logits.argmax(1).numpy() == noisy).mean())

        def told(name: str) -> dict[str, float]:
            if name == "test":
                tested.append(score(name)["accuracy"])
            return score(name) if name != "held" else held[len(tested) - 1]

        setup.score = told
        return setup

    monkeypatch.setattr(labels_classes, "prepare", made_up)
    row = CLASSES.run(cell(CLASSES, "digits", arm, 0.4, 1e-3, 0, 3))
    assert row["test_accuracy"] == tested[epoch] and tested[1] != tested[2]


def test_controls_of_judging_are_what_they_are_called() -> None:
    table, mislabeled = ExampleTable(np.arange(5)), torch.tensor([1, 0, 0, 1, 0]).bool()
    table.weight = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    shuffled = labels_arms.ShuffledWeights(table, mislabeled, 5)
    assert shuffled.weights(torch.arange(3), torch.zeros(3)).tolist() == pytest.approx([0.3, 0.1, 0.2])
    with pytest.raises(common.RecipeError, match="two examples or more in every forward"):
        shuffled.weights(torch.arange(1), torch.zeros(1))

    told = labels_arms.DropTold(table, mislabeled, 5)
    losses = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3])
    z = -losses.expm1().log()  # of these losses
    for rows in (torch.arange(3), torch.arange(3, 5)):  # an epoch with all
        assert told.weights(rows, z[rows]).tolist() == [1] * len(rows)
    assert told.weights(torch.arange(5), torch.zeros(5)).tolist() == [1, 0, 1, 0, 1]  # the largest two go


def test_weights_of_an_arm_are_of_the_log_odds_in_the_very_step() -> None:
    logits, labels = torch.randn(6, 3), torch.arange(6) % 3
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    with labels_arms.LogOdds() as seen:
        torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(seen.found, (p / (1 - p)).log())
    z = torch.tensor([-1.0, 2.0], requires_grad=True)
    with labels_arms.LogOdds() as seen:
        torch.nn.functional.logsigmoid(z)
    em = labels_arms.EM(ExampleTable(np.arange(2)), torch.zeros(2).bool(), 8)
    w = 0.9 * z.sigmoid() / (0.9 * z.sigmoid() + 0.1 * (-z).sigmoid())
    (slope,) = torch.autograd.grad(
        -w.detach() @ z.sigmoid().log() - (1 - w.detach()) @ (-z).sigmoid().log(), z
    )
    torch.testing.assert_close(em.weights(torch.arange(2), seen.found) * -(-z).sigmoid(), slope)
    assert em.rate == pytest.approx(0.1 + 0.025 * ((1 - w).mean().item() - 0.1))
    hoelder = labels_arms.Hoelder(ExampleTable(np.arange(2)), torch.zeros(2).bool(), 8)
    (slope,) = torch.autograd.grad((-3 * z.sigmoid() ** 2 + 2 * z.sigmoid() ** 3).sum(), z)
    torch.testing.assert_close(hoelder.weights(torch.arange(2), seen.found) * -(-z).sigmoid(), slope)


def test_losses_that_are_told_the_share_are_the_published_ones(recipe: Path, tmp_path: Path) -> None:
    noise, found = 0.3, {}
    for arm in ("adamw", "robust", "conservative", "ipo"):
        one = cell(PAIRS, recipe, arm, noise, 1e-3, 0, 1)
        trainer = labels_pairs.prepare(one, str(tmp_path / arm)).trainer
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in trainer.model.parameters():
                weight.add_(weight.std() * torch.randn_like(weight))
            batch = trainer.data_collator([trainer.train_dataset[0]])
            loss = trainer.compute_loss(trainer.model.eval(), batch).item()
        found[arm] = loss, trainer._metrics["eval"]["rewards/margins"][0]
    z = found["adamw"][1]
    assert abs(z) > 0.05 and all(margin == pytest.approx(z) for _, margin in found.values())
    right, mislabeled = np.log1p(np.exp(-z)), np.log1p(np.exp(z))  # -log σ(z), -log σ(-z)
    assert found["adamw"][0] == pytest.approx(right, rel=1e-4)
    assert found["robust"][0] == pytest.approx(
        ((1 - noise) * right - noise * mislabeled) / (1 - 2 * noise), rel=1e-4
    )
    assert found["conservative"][0] == pytest.approx((1 - noise) * right + noise * mislabeled, rel=1e-4)
    assert abs(found["ipo"][0] - right) > 1  # (z / (β tokens) - 1 / 2β)², about 25


@pytest.mark.parametrize("kind", ["uniform", "class", "group"])
def test_labels_are_spoiled_as_said(kind: str, tmp_path: Path) -> None:
    task = "digits" if kind == "uniform" else f"digits-{kind}"
    setup = labels_classes.prepare(cell(CLASSES, task, "adamw", 0.2, 1e-3, 1, 1), str(tmp_path))
    x, clean = labels_classes.draw(task, 1)["train"]
    labels = np.array([int(row["labels"]) for row in setup.trainer.train_dataset])
    assert np.array_equal(labels != clean, setup.mislabeled) and setup.mislabeled.sum() == 180
    step = (labels - clean)[setup.mislabeled] % 10
    assert (len(set(step)) > 5) == (kind == "uniform")
    spread = [
        np.square(x[part] - x[part].mean(0)).sum(1).mean() for part in (setup.mislabeled, ~setup.mislabeled)
    ]
    assert (spread[0] < 0.8 * spread[1]) == (kind == "group")


def test_completions_are_put_out_of_order() -> None:
    text = " one two three four five six seven eight"
    prose = Dataset.from_dict({"prompt": ["a"] * 40, "chosen": [text] * 39 + [" no no"]})
    data = labels_pairs.easier(prose, 3)
    assert len(data) == 39  # of one word twice nothing can be made
    for row in data:
        before, after = text.split(" "), row["rejected"].split(" ")
        moved = [a != b for a, b in zip(before, after, strict=True)]
        assert sorted(before) == sorted(after) and not moved[0]
        assert sum(moved) == labels_pairs.EXCHANGED, row
    again, other = (labels_pairs.easier(prose, seed)["rejected"] for seed in (3, 4))
    assert again == data["rejected"] != other


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe for DPO as one may have it: a stock optimizer, no validation split, two prompts too long."""
    save_tiny_model(tmp_path / "model", "llama", tied=True)
    (tmp_path / "data").mkdir()
    for split, data in {"train": train_pairs(), "test": preferences(6, 200)}.items():
        data.to_parquet(tmp_path / "data" / f"{split}.parquet")
    return rewritten(
        RECIPES / "tiny/dpo.yaml",
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
    """72 pairs that all differ, the last two with prompts longer than the recipe's ``max_length``."""
    long = preferences(2, 300).map(lambda row: {"prompt": " ".join([row["prompt"]] * 40)})
    every = concatenate_datasets([preferences(70), long])
    return every.map(
        lambda row, i: {"prompt": f"{i} {row['prompt']}", "chosen": f"{row['chosen']} {i}"}, with_indices=True
    )


def rewritten(path: Path, to: Path, **changed: Any) -> Path:
    to.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changed))
    return to


def test_a_recipe_of_ones_own_is_data(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--arm", "adamw-early", "weight", "--learning_rate", "2e-3", "--noise", "0.3", "--seed", "0"]
    out, sizes, prepare = tmp_path / "mine.csv", [], labels_pairs.prepare

    def watched(cell: Any, folder: str) -> Any:
        setup = prepare(cell, folder)
        parts = {name: len(part) for name, part in setup.trainer.eval_dataset.items()}
        sizes.append({"train": len(setup.trainer.train_dataset)} | parts)
        return setup

    monkeypatch.setattr(labels_pairs, "prepare", watched)
    assert run.main(["labels_pairs", "--data", str(recipe), *options, "--out", str(out)]) == 0
    assert not (recipe.parent / "out").exists()
    plain = {"train": 63, "validation": 7, "test": 6, "mislabeled": 19}  # of 72, 8 and two that are too long
    assert sizes == [plain | {"train": 57, "mislabeled": 17, "held": 6}, plain]
    rows = pd.read_csv(out)
    assert rows["arm"].tolist() == ["adamw-early", "weight"] and (rows["test_kl_per_token"] > 0).all()
    assert rows["noise_rate"].isna().tolist() == [True, False]


def test_a_cell_is_a_run_of_the_recipe(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = {"optim": "poprisk_adamw", "poprisk_gate": "hard", "dataset_validation_split": "test"}
    path = rewritten(recipe, tmp_path / "hard.yaml", push_to_hub=False, **gate)
    monkeypatch.setattr(dpo, "MAX_FLIPPED_EVAL", 5)
    row = PAIRS.run(cell(PAIRS, path, "hard", 0.3, 2e-3, 3, 2))
    argv = ["--learning_rate", "2e-3", "--seed", "3", "--flip_seed", "3", "--save_strategy", "no"]
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--config", str(path), *argv])
    dpo.main()
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["scores"]
    found = {name: row[f"test_{name}"] for name in ("accuracy", "kl_per_token")}
    assert found == {name: scores["test"][name] for name in found}
    assert row["validation_accuracy"] == scores["validation"]["accuracy"]
    assert row["mislabeled_fitted"] == scores["flipped"]["accuracy"]


def test_other_optimizers_and_the_basis_are_arms(recipe: Path, tmp_path: Path) -> None:
    arms = ("adamw", "lion", "muon", "soap", "soap+weight", "basis", "basis+hard", "basis+random-mask")
    found = {arm: PAIRS.run(cell(PAIRS, recipe, arm, 0.3, 2e-3, 0, 2)) for arm in arms}
    assert len({row["test_kl_per_token"] for row in found.values()}) == len(arms)  # not the same run
    for row in found.values():
        assert row["test_accuracy_2"] == row["test_accuracy"] <= row["test_accuracy_best"]
        assert row["test_accuracy_1"] is not None and row["test_accuracy_3"] is None
    assert found["soap+weight"]["noise_rate"] is not None and found["soap"]["noise_rate"] is None
    trainer = labels_pairs.prepare(cell(PAIRS, recipe, "muon", 0.3, 2e-3, 0, 2), str(tmp_path)).trainer
    hidden, rest = trainer.create_optimizer().param_groups
    embedding = trainer.model.get_input_embeddings().weight
    assert len(hidden["params"]) == 14 and all(p.dim() == 2 and p is not embedding for p in hidden["params"])
    assert hidden["lr"] == rest["lr"] == 2e-3 and rest["betas"] == (0.9, 0.95)
    decayed = rewritten(recipe, tmp_path / "decayed.yaml", weight_decay=0.1)
    with pytest.raises(common.RecipeError, match="lion is run without weight decay"):
        PAIRS.run(cell(PAIRS, decayed, "lion", 0.3, 2e-3, 0, 2))


def test_a_leap_trains_nothing_whatever_the_data_say(recipe: Path, tmp_path: Path) -> None:
    trainer = labels_pairs.prepare(cell(PAIRS, recipe, "leap", 0.3, 2e-3, 0, 0), str(tmp_path)).trainer
    assert trainer.args.num_train_epochs == 0 and trainer.args.poprisk_leap == 1.0


def test_validation_pairs_are_set_apart_with_their_labels_as_they_are(recipe: Path, tmp_path: Path) -> None:
    clean, drawn = {row["prompt"]: row["chosen"] for row in train_pairs()}, []
    for seed in (0, 1):
        one = cell(PAIRS, recipe, "hard", 0.45, 1e-3, seed, 1)
        trainer = labels_pairs.prepare(one, str(tmp_path / "run")).trainer
        assert trainer.args.optim == "poprisk_adamw" and not trainer.args.push_to_hub
        assert trainer.model.config._attn_implementation == "eager"
        data = {"train": trainer.train_dataset, **trainer.eval_dataset}
        assert len(data.pop("test")) == 6
        prompts = {name: {row["prompt"] for row in part} for name, part in data.items()}
        assert not prompts["train"] & prompts["validation"] and prompts["mislabeled"] < prompts["train"]
        kept = {
            name: {row["prompt"] for row in part if row["chosen"] == clean[row["prompt"]] + "<|end|>"}
            for name, part in data.items()
        }
        assert kept["validation"] == prompts["validation"] and not kept["mislabeled"]
        assert kept["train"] == prompts["train"] - prompts["mislabeled"]
        drawn.append(prompts["validation"])
    assert drawn[0] != drawn[1]


def test_pairs_are_told_or_dropped_before_training(recipe: Path, tmp_path: Path) -> None:
    found = {}
    for arm in ("weight", "drop", "right-only"):
        setup = labels_pairs.prepare(cell(PAIRS, recipe, arm, 0.3, 3e-3, 0, 1), str(tmp_path / arm))
        setup.trainer.train()
        table = setup.trainer._label_noise.table
        assert table.judged.sum() == len(setup.trainer.train_dataset) == len(table) - 1  # one is too long
        found[arm] = table.weight[table.judged]
    mislabeled = setup.mislabeled[table.judged.numpy()]
    assert torch.equal(found["drop"], found["weight"].round())
    assert torch.equal(found["right-only"], torch.from_numpy(~mislabeled).float())
    assert found["weight"].unique().numel() > 10


def test_pairs_are_judged_at_every_share_of_flips(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 20)) + 1.5  # all of one sign, mostly: clean
    monkeypatch.setattr(labels_judged, "features", lambda cell: [x.astype(np.float32)])
    row = labels_judged.run({"data": "dpo", "seed": 0, "features": "gradients"})
    other = labels_judged.run({"data": "dpo", "seed": 0, "features": "last"})
    assert np.isnan(row["folds_20"]) and other["folds_20"] > 0.9
    assert row["rate_0"] < 0.02 and row["below_half_0"] == 0
    for noise in (10, 20, 30):
        assert row[f"auroc_least_{noise}"] > 0.97 and row[f"error_{noise}"] < 0.15
        assert row[f"low_{noise}"] < noise / 100 < row[f"high_{noise}"]
    rows = [{"data": "dpo", "arm": "gradients", **row}, {"data": "dpo", "arm": "last-state", **other}]
    assert f"| dpo, 20 % | {row['rate_20']:.3f} [" in labels_tables.judged(pd.DataFrame(rows))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}, "SystemExit"),
        ({"model_name_or_path": "./nowhere"}, "model_name_or_path=./nowhere is not a folder"),
        ({"max_steps": 3}, "max_steps of .* has no place here"),
    ],
)
def test_a_recipe_that_cannot_be_run_is_refused(
    changed: Any, message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rewritten(recipe, tmp_path / "other.yaml", **changed)
    argv = ["labels_pairs", "--data", str(path), "--noise", "0.3", "--learning_rate", "1e-3", "--seed", "0"]
    argv += ["--arm", "hard", "--out", str(tmp_path / "out.csv")]
    if message == "SystemExit":  # in the words of recipes/dpo.py
        assert run.main(argv) == 1
        assert "error: " in capsys.readouterr().err
    else:
        with pytest.raises(common.RecipeError, match=message):
            run.main(argv)
    assert not (tmp_path / "out.csv").exists()


def test_cross_training_judges_each_half_by_the_other(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels_judged, "CROSS_TRAINED", (0.3,))
    score, seen = labels_judged.log_odds, []

    def watched(trainer: Any, pairs: Dataset) -> np.ndarray:
        found = score(trainer, pairs)
        seen.append((set(trainer.train_dataset["prompt"]), set(pairs["prompt"]), trainer.state.global_step))
        return found

    monkeypatch.setattr(labels_judged, "log_odds", watched)
    one = {"features": "cross-trained", "learning_rate": 3e-3, "arm": "cross-trained-0.003", "seed": 0}
    row = labels_judged.run(one | {"data": str(recipe)})
    (one, held, start), (trained, after, steps), (other, _, _), (_, others, _) = seen
    assert start == 0 < steps and held == after == other and others == one == trained
    assert not held & others and len(held) + len(others) == 63 and abs(len(held) - len(others)) <= 1
    assert 0 < row["auroc_30"] < 1 and row["low_30"] <= row["rate_30"] <= row["high_30"]
    assert row["likelihood_30"] < 0
