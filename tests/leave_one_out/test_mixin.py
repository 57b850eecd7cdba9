"""Class labels judged before the first step, in the trainer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from hf_poprisk.leave_one_out import ClassNoise, ExampleTable
from hf_poprisk.leave_one_out.log_odds import class_log_odds
from leave_one_out.helpers import Classifier, classify, examples, first_gradients, same, weights


@pytest.mark.parametrize("gate", ["none", "hard"])
def test_audit_changes_nothing_in_training(gate: str, tmp_path: Path) -> None:
    """Bit for bit."""
    seen = []
    for mode in ("off", "audit"):
        options = {"poprisk_label_noise": mode, "poprisk_gate": gate, "num_train_epochs": 1}
        trainer = classify(tmp_path, examples(240, wrong=0.2), optim="poprisk_adamw", **options)
        trainer.train()
        seen.append(weights(trainer))
    assert (
        same(*seen) and trainer._label_noise.table.columns["weight"].min() < 0.1
    )  # that it would have given
    assert "poprisk/noise_rate" in trainer.state.log_history[0]
    assert not any("poprisk/loss_weighted" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_columns_that_the_model_does_not_take_are_left_out_of_judging_too(kind: Any, tmp_path: Path) -> None:
    """As they are in training: a text beside its tokens."""
    found = []
    for more in ({}, {"score": 1.0}):
        rows = [{**row, **more} for row in examples()]
        data = kind(rows) if kind is list else kind(rows).with_format("torch")
        trainer = classify(tmp_path, data, poprisk_label_noise="audit")
        found.append(trainer.judge_labels().log_odds)
    assert np.array_equal(*found)


@pytest.mark.parametrize(("gate", "size"), [("none", 4), ("none", 1), ("hard", 4), ("hard", 1)])
def test_weights_act_from_the_first_step(gate: str, size: int, tmp_path: Path) -> None:
    """Gradients and logs of the first step, against one backward per example."""
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
    options |= {"max_grad_norm": 0.0, "poprisk_gate": gate, "train_sampling_strategy": "sequential"}
    data = examples(240, wrong=0.2)[46:] + examples(240, wrong=0.2)[:46]  # both kinds come first
    trainer = classify(tmp_path, data, poprisk_label_noise="weight", **options)
    got, start = first_gradients(trainer), weights(trainer)
    trainer.train()
    judge = trainer._label_noise

    trainer.model.load_state_dict(start)
    trainer.model.zero_grad()
    weight, losses = judge.table.columns["weight"][:4], []
    for row, w in zip(data[:4], weight, strict=True):
        losses.append(F.cross_entropy(trainer.model.net(row["x"][None]), row["labels"][None]))
        (w * losses[-1] / 4).backward()
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6)
    assert weight.max() - weight.min() > 0.5
    log = trainer.state.log_history[0]
    assert log["poprisk/weight_mean"] == pytest.approx(weight.mean().item(), rel=1e-5)
    assert log["poprisk/loss_weighted"] == pytest.approx(
        (weight * torch.stack(losses)).mean().item(), rel=1e-4
    )
    assert log["poprisk/noise_rate"] == judge.fit.rate


def test_wrong_labels_are_found(tmp_path: Path) -> None:
    trainer = classify(tmp_path, examples(240, wrong=0.25, seed=3), poprisk_label_noise="weight", max_steps=1)
    trainer.train()
    judge = trainer._label_noise
    assert judge.weighted and judge.fit.low < 0.25 < judge.fit.high
    suspicion = -judge.table.columns["log_odds"]
    ranks = suspicion.argsort().argsort().float()
    assert (ranks[:60].sum() - 60 * 59 / 2) / (60 * 180) > 0.97
    weight, p = judge.table.columns["weight"], torch.from_numpy(judge.p_correct()).float()
    torch.testing.assert_close(weight, (2 * p - 1).clamp(min=0))
    assert weight[:60].mean() < 0.1 and weight[60:].mean() > 0.9


def test_labels_that_are_not_predicted_are_not_followed(tmp_path: Path) -> None:
    """Of guessed labels every second one would look mislabeled."""
    data = examples(120)
    order = np.random.default_rng(0).permutation(120)
    data = [{"x": row["x"], "labels": data[i]["labels"]} for row, i in zip(data, order, strict=True)]
    trainer = classify(tmp_path, data, poprisk_label_noise="weight", num_train_epochs=1)
    trainer.train()
    judge = trainer._label_noise
    assert not judge.weighted and (judge.table.columns["weight"] == 1).all()
    assert "the ambiguous look wrong" in judge.doubt


@pytest.mark.parametrize("gate", ["none", "hard"])
def test_an_ignored_label_leaves_the_others_alone(gate: str, tmp_path: Path) -> None:
    data = examples(wrong=0.2)
    data[5]["labels"] = torch.tensor(-100)
    trainer = classify(tmp_path, data, poprisk_label_noise="weight", poprisk_gate=gate)
    trainer.train()
    judge = trainer._label_noise
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert not any(e.get("poprisk/steps_skipped") for e in trainer.state.log_history)
    assert judge.table.visits.tolist() == [1] * 5 + [0] + [1] * 54
    assert judge.table.columns["weight"][5] == 1 and judge.p_correct()[5] == pytest.approx(1 - judge.fit.rate)
    assert all(np.isfinite(e["poprisk/loss_weighted"]) for e in trainer.state.log_history if "loss" in e)


def test_the_features_do_not_know_the_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are gradients of one combination of the logits, the same one for all examples."""
    given: list[Any] = []
    judge_all = ClassNoise.judge_all
    monkeypatch.setattr(
        ClassNoise, "judge_all", lambda self, *args: (given.append(args), judge_all(self, *args))[1]
    )
    for shift in (0, 1):
        data = [{"x": e["x"], "labels": (e["labels"] + shift) % 3} for e in examples()]
        classify(tmp_path, data, poprisk_label_noise="audit", max_steps=1).judge_labels()
    (index, parts, labels), (_, shifted, others) = given
    assert index.tolist() == list(range(60)) and len(parts) == 2
    assert labels.tolist() == [int(e["labels"]) for e in examples()] == [(i - 1) % 3 for i in others]
    for one, other in zip(parts, shifted, strict=True):
        np.testing.assert_array_equal(one, other)
    # the head's are apart: its inputs, in its basis
    assert [part.shape[1] for part in parts] == [16 * 3, 6 * 16]


def test_judging_leaves_the_model_and_chance_as_they_were(tmp_path: Path) -> None:
    class Dropped(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.insert(2, nn.Dropout(0.5))

    trainer = classify(tmp_path, examples(), Dropped(), poprisk_label_noise="audit")
    before, chance = weights(trainer), torch.get_rng_state()
    one, other = trainer.judge_labels(), trainer.judge_labels()
    assert same(before, weights(trainer)) and torch.equal(torch.get_rng_state(), chance)
    assert trainer.model.training and all(
        p.grad is None and p.requires_grad for p in trainer.model.parameters()
    )
    np.testing.assert_array_equal(one.log_odds, other.log_odds)  # without dropout


def test_a_padding_copy_is_counted_once() -> None:
    """It stands on two ranks."""
    judge = ClassNoise("weight", ExampleTable(np.arange(4)))
    logits, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    with judge.visit(torch.tensor([2, 0, 3])):
        F.cross_entropy(logits, labels)
    judge.finish_step(lambda rows: torch.cat([rows, rows[1:2]]))
    z: Tensor = class_log_odds(logits, labels)
    assert judge.pop_logs()["poprisk/loss_weighted"] == pytest.approx(F.softplus(-z).mean().item(), rel=1e-5)
