"""Judging labels with losses, data and batches of the user's own: the scores of the plain trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import QUIET
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from hf_poprisk import PopRiskMixin, PopRiskTrainer, PopRiskTrainingArguments
from leave_one_out.helpers import Classifier, examples


class OwnLoss(PopRiskTrainer):
    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        return F.cross_entropy(model(inputs["x"])["logits"], inputs["labels"])


class TupleLoss(Trainer):
    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        x, labels = inputs
        return F.cross_entropy(model(x)["logits"], labels)


class OfTuples(PopRiskMixin, TupleLoss):
    pass


class Convolved(Classifier):
    """With a layer whose examples go one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return super().forward(x + self.conv(x[:, None])[:, 0], labels)


def as_tuples(data: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(row["x"], row["labels"]) for row in data]


def stacked(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, labels = zip(*rows, strict=True)
    return torch.stack(x), torch.stack(labels)


def named(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return dict(zip(("x", "labels"), stacked(rows), strict=True))


def scores(
    tmp_path: Path,
    trainer: type[Any],
    data: Any,
    collator: Any = None,
    model: type[nn.Module] = Classifier,
    mode: str = "audit",
    size: int = 4,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The table, and the weights at the end of three epochs."""
    options = {**QUIET, "per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
    options |= {"num_train_epochs": 3, "learning_rate": 1e-2, "poprisk_label_noise": mode}
    args = PopRiskTrainingArguments(str(tmp_path), **options)
    run = trainer(model(), args=args, train_dataset=data, data_collator=collator)
    run.train()
    table = run._label_noise.table
    assert (table.visits == 1).all() and len(table.visits) == len(data)
    return dict(table.columns), [p.detach().clone() for p in run.model.parameters()]


def assert_same(got: Any, expected: Any) -> None:
    for name, column in expected[0].items():
        torch.testing.assert_close(got[0][name], column, rtol=1e-3, atol=1e-4, msg=name)
    for ours, theirs in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["audit", "weight"])
def test_whoever_computes_the_loss_and_whatever_the_items_are(mode: str, tmp_path: Path) -> None:
    data = examples(60, wrong=0.25)
    expected = scores(tmp_path, PopRiskTrainer, data, mode=mode)
    assert expected[0]["log_odds"].isfinite().all()
    assert_same(scores(tmp_path, OwnLoss, data, mode=mode), expected)
    assert_same(scores(tmp_path, PopRiskTrainer, as_tuples(data), named, mode=mode), expected)
    assert_same(scores(tmp_path, OfTuples, as_tuples(data), stacked, mode=mode), expected)


@pytest.mark.parametrize("mode", ["audit", "weight"])
@pytest.mark.parametrize(
    ("model", "trainer"), [(Classifier, PopRiskTrainer), (Convolved, PopRiskTrainer), (Convolved, OwnLoss)]
)
def test_one_by_one_the_scores_are_those_of_single_examples(
    model: type[nn.Module], trainer: type[Any], mode: str, tmp_path: Path
) -> None:
    """The labels are read off the loss of the whole micro-batch, and not off those of its examples."""
    data = examples(60, wrong=0.25)
    several = scores(tmp_path, trainer, data, model=model, mode=mode)
    assert several[0]["log_odds"].isfinite().all()
    assert_same(several, scores(tmp_path, trainer, data, model=model, mode=mode, size=1))
