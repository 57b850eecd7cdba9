"""recipes/held_out.py: own effects beside models that never saw the example."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from transformers import Trainer

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))

import held_out  # noqa: E402
from noisy_labels.cells import Cell  # noqa: E402

CELL = Cell("digits", "audit", 0.3, 3e-3, 0, 2)


def test_the_numbers_of_a_known_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what two epochs taught each example, 0.25 and then 0.75, a fifth stays."""
    rng, n = np.random.default_rng(0), 400
    wrong, base = np.arange(n) < 100, rng.logistic(size=(2, n)) + 1.0
    base[:, wrong] *= -1
    taught = np.array([0.25, 1.0])[:, None] * rng.uniform(1.0, 2.0, size=n)  # so far

    def trained(cell: Cell, left_out: np.ndarray) -> held_out.Run:
        if len(left_out):
            assert cell.arm == "adamw"
            return held_out.Run(base[:, left_out], np.empty(0), wrong[left_out], 10, np.nan)
        return held_out.Run(base + 0.2 * taught, 0.5 * taught, wrong, 10, 0.5)

    monkeypatch.setattr(held_out, "train", trained)
    first, second = held_out.compare(CELL, folds=3)
    epoch, right, of_wrong, estimate, explained, halved, best, *scores = second
    assert epoch == 2 and best == pytest.approx(0.2)
    assert right == pytest.approx(0.2 * taught[1, 100:].mean()) and estimate == pytest.approx(
        0.5 * taught[1].mean()
    )
    assert of_wrong == pytest.approx(0.2 * taught[1, :100].mean())
    assert explained == pytest.approx(1 - (0.3 / 0.2) ** 2)
    assert halved == pytest.approx(1 - (0.675 / 0.2) ** 2)  # 0.75 + 0.25/2 of what was taught
    seen = base[1] + 0.2 * taught[1]
    scored = [base[1], seen - 0.5 * taught[1], seen - 0.875 * taught[1], seen]
    assert scores[::2] == pytest.approx([held_out.fit_noise(z, 10).rate for z in scored])
    assert scores[1::2] == pytest.approx([roc_auc_score(~wrong, z) for z in scored])
    assert len(set(scores)) == 8
    printed = held_out.table([[first, second], [first, second]])
    assert len(printed.splitlines()) == 4 and f"| 2 | {right:.2f} |" in printed


def test_what_is_left_out_is_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    train = Trainer.train

    def watched(self: Trainer, *args: Any) -> Any:
        seen.append(np.array([row["x"].numpy() for row in self.train_dataset]))
        return train(self, *args)

    monkeypatch.setattr(Trainer, "train", watched)
    part = np.arange(5, 900, 6)
    everything, without = held_out.train(CELL, np.array([], dtype=int)), held_out.train(CELL, part)
    assert [len(x) for x in seen] == [900, 750]
    assert np.array_equal(seen[1], np.delete(seen[0], part, axis=0))
    assert everything.log_odds.shape == everything.own_effect.shape == (2, 900)
    assert without.log_odds.shape == (2, 150) and everything.num_labels == 10
    assert np.array_equal(everything.wrong[part], without.wrong) and without.wrong.any()
    assert (np.diff(everything.own_effect, axis=0, prepend=0) > 0).all()
    # the same examples, by models of nearly the same data
    assert np.corrcoef(everything.log_odds[1][part], without.log_odds[1])[0, 1] > 0.9


def test_senseless_options_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(held_out, "train", lambda *args: pytest.fail("it began"))
    for options in (["--folds", "1"], ["--noise", "0.5"], ["--learning_rate", "0"]):
        argv = ["held_out.py", "--task", "digits", "--learning_rate", "1e-3", *options]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stopped:
            held_out.main()
        assert stopped.value.code == 2 and options[0] in capsys.readouterr().err
