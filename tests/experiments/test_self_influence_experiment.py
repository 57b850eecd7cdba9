"""The experiment self_influence: self-influences beside models that never saw the example."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import self_influence
from common import RecipeError
from sklearn.metrics import roc_auc_score
from transformers import Trainer

CELL = self_influence.EXPERIMENT.options(
    {"arm": "adamw", "data": "digits", "noise": 0.3, "learning_rate": 3e-3, "epochs": 2, "seed": 0}
)


def test_the_numbers_of_a_known_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what two epochs taught each example, 0.25 and then 0.75, a fifth stays."""
    rng, n = np.random.default_rng(0), 400
    mislabeled, base = np.arange(n) < 100, rng.logistic(size=n) + 1.0
    base[mislabeled] *= -1
    taught = np.array([0.25, 1.0])[:, None] * rng.uniform(1.0, 2.0, size=n)  # so far

    def trained(cell: Any, left_out: np.ndarray) -> self_influence.Run:
        if len(left_out):
            return self_influence.Run(base[left_out], np.empty(0), mislabeled[left_out], 10, np.nan)
        return self_influence.Run(base + 0.2 * taught[1], 0.5 * taught, mislabeled, 10, 0.5)

    monkeypatch.setattr(self_influence, "train", trained)
    found = self_influence.run(CELL | {"folds": 3})
    assert found["best_share"] == pytest.approx(0.2)
    assert found["influence_clean"] == pytest.approx(0.2 * taught[1, 100:].mean())
    assert found["influence_mislabeled"] == pytest.approx(0.2 * taught[1, :100].mean())
    assert found["estimate"] == pytest.approx(0.5 * taught[1].mean())
    assert found["explained"] == pytest.approx(1 - (0.3 / 0.2) ** 2)
    # 0.75 + 0.25/2 of what was taught
    assert found["explained_halved"] == pytest.approx(1 - (0.675 / 0.2) ** 2)
    seen = base + 0.2 * taught[1]
    scored = [base, seen - 0.5 * taught[1], seen - 0.875 * taught[1], seen]
    for name, z in zip(self_influence.SCORES, scored, strict=True):
        assert found[f"rate_{name}"] == pytest.approx(self_influence.fit_noise(z, 10).rate)
        assert found[f"auroc_{name}"] == pytest.approx(roc_auc_score(~mislabeled, z))
    printed = self_influence.table(pd.DataFrame([CELL | found, CELL | found]))
    assert len(printed.splitlines()) == 3 and f"| 2 | {found['influence_clean']:.2f} |" in printed


def test_what_is_left_out_is_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    train = Trainer.train

    def watched(self: Trainer, *args: Any) -> Any:
        seen.append(np.array([row["x"].numpy() for row in self.train_dataset]))
        return train(self, *args)

    monkeypatch.setattr(Trainer, "train", watched)
    part = np.arange(5, 900, 6)
    everything, without = (
        self_influence.train(CELL, np.array([], dtype=int)),
        self_influence.train(CELL, part),
    )
    assert [len(x) for x in seen] == [900, 750]
    assert np.array_equal(seen[1], np.delete(seen[0], part, axis=0))
    assert everything.log_odds.shape == (900,) and everything.self_influence.shape == (2, 900)
    assert without.log_odds.shape == (150,) and everything.num_labels == 10
    assert np.array_equal(everything.mislabeled[part], without.mislabeled) and without.mislabeled.any()
    assert (np.diff(everything.self_influence, axis=0, prepend=0) > 0).all()
    # the same examples, by models of nearly the same data
    assert np.corrcoef(everything.log_odds[part], without.log_odds)[0, 1] > 0.9


def test_one_part_is_none() -> None:
    with pytest.raises(RecipeError, match="folds must be at least 2"):
        self_influence.run(CELL | {"folds": 1})
