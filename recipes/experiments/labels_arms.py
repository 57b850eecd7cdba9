"""The arms against mislabeled examples: AdamW, the gates, what others do, and controls of the judging."""

from typing import Any

import torch
from common import RecipeError
from torch import Tensor
from torch.nn import functional as F
from training import GATES

from hf_poprisk.leave_one_out import ClassNoise, PairNoise


class ShuffledWeights(ClassNoise):
    """Control: each example gets the weight of its neighbour in the (shuffled) micro-batch."""

    def sample_weight(self, visit: Any, log_odds: Tensor) -> Tensor:
        super().sample_weight(visit, log_odds)
        if len(visit.weight) < 2:
            raise RecipeError("weight-shuffled needs two examples or more in every forward.")
        visit.weight = visit.weight.roll(1)
        return visit.weight


class DropTold(ClassNoise):
    """From the second epoch on without the share, told, with the largest mean loss of the epochs before."""

    told = 0.0  # the share of mislabeled examples
    never_seen = 0  # examples that the trainer does without: TRL those whose prompt fills max_length
    _epochs = -1

    def sample_weight(self, visit: Any, log_odds: Tensor) -> Tensor:
        super().sample_weight(visit, log_odds)
        if self._epochs < 0:
            self._visits, self._losses = torch.zeros(2, len(self.table))
        epochs = int(self._visits.kthvalue(self.never_seen + 1).values)
        if epochs > self._epochs:
            self._epochs, self._kept = epochs, torch.ones(len(self.table))
            mean = self._losses / self._visits.clamp(min=1)
            self._kept[mean.topk(round(self.told * len(mean)) if epochs else 0).indices] = 0.0
        self._visits[visit.rows] += 1
        self._losses[visit.rows] += F.softplus(-log_odds)
        visit.weight = self._kept[visit.rows]
        return visit.weight


class _RightOnly:
    """The most that judging could give: told which examples are mislabeled, it trains on none of them."""

    def judge_all(self, *args: Any) -> Any:
        found = super().judge_all(*args)
        self.table.columns["weight"] = (~self.mislabeled).float()
        return found


class EM(PairNoise):
    """Expectation-maximization by the trained model's own margins, as in RE-PO (arXiv 2509.24159).

    E: w = P(the label is correct), by the margin and the rate. M: the rate follows the mean of 1 − w, and the
    loss is −w log σ(z) − (1 − w) log σ(−z), whose slope is (w − σ(z))/σ(−z) times that of −log σ(z). Our own
    reading of it; the rate begins at .1, and moves by a tenth of the way per step.
    """

    rate = 0.1

    def sample_weight(self, visit: Any, log_odds: Tensor) -> Tensor:
        super().sample_weight(visit, log_odds)
        right, wrong = torch.sigmoid(log_odds.double()), torch.sigmoid(-log_odds.double())
        w = (1 - self.rate) * right / ((1 - self.rate) * right + self.rate * wrong)
        visit.weight = ((w - right) / wrong).float()
        self.rate += 0.1 * len(w) / self.examples_per_step * float((1 - w).mean() - self.rate)
        return visit.weight


class RightOnly(_RightOnly, ClassNoise):
    """Of classes."""


class RightPairs(_RightOnly, PairNoise):
    """Of pairs."""


class DropPairs(PairNoise):
    """Without the pairs that are more likely mislabeled than clean, in place of weights."""

    def judge_all(self, *args: Any) -> Any:
        found = super().judge_all(*args)
        self.table.columns["weight"].round_()
        return found


def judged(mode: str, gate: str = "none", **more: Any) -> dict[str, Any]:
    return {"poprisk_gate": gate, "poprisk_label_noise": mode, **more}


# early: by this score of a split of the training data, whose labels are as noisy; risk: early too, by the
# population gain; judge: in place of the package's
ARMS: dict[str, dict[str, Any]] = {
    "adamw": GATES["adamw"],
    "adamw-early": {"poprisk_gate": "none", "early": "accuracy"},
    "adamw-early-loss": {"poprisk_gate": "none", "early": "loss"},
    "adamw-risk": {"poprisk_gate": "none", "poprisk_risk": True},
    **{name: GATES[name] for name in ("hard", "soft", "random-mask", "random-mask-soft")},
}
CLASS_ARMS = {
    "drop-told": judged("weight", judge=DropTold),
    "weight": judged("weight"),
    "weight+soft": judged("weight", "soft"),
    "weight-shuffled": judged("weight", judge=ShuffledWeights),
    "right-only": judged("weight", judge=RightOnly),
}
PAIR_ARMS = {
    "weight": judged("weight"),
    "weight+soft": judged("weight", "soft"),
    "drop": judged("weight", judge=DropPairs),
    "right-only": judged("weight", judge=RightPairs),
    "em": judged("weight", judge=EM),
}
