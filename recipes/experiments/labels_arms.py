"""The arms against mislabeled examples: AdamW, the gates, what others do, and controls of the judging."""

from typing import Any

import rivals
import torch
from common import RecipeError
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from training import GATES

from hf_poprisk.leave_one_out import ExampleTable
from hf_poprisk.leave_one_out.noise import class_log_odds


class Arm:
    """Weights of an arm's own in place of the judge's.

    Args:
        table: as the labels were judged.
        mislabeled: which labels are, [n] bool.
        examples_per_step: b.
    """

    def __init__(self, table: ExampleTable, mislabeled: Tensor, examples_per_step: int) -> None:
        self.table, self.mislabeled, self.examples_per_step = table, mislabeled, examples_per_step

    def weights(self, rows: Tensor, log_odds: Tensor) -> Tensor:
        """[N]; log_odds: of these examples' labels, by the model in this very step, [N]."""
        return self.table.weight[rows]


class ShuffledWeights(Arm):
    """Control: each example gets the weight of its neighbour in the (shuffled) micro-batch."""

    def weights(self, rows: Tensor, log_odds: Tensor) -> Tensor:
        if len(rows) < 2:
            raise RecipeError("weight-shuffled needs two examples or more in every forward.")
        return super().weights(rows, log_odds).roll(1)


class DropTold(Arm):
    """From the second epoch on without the share, told, with the largest mean loss of the epochs before."""

    _epochs = -1

    def weights(self, rows: Tensor, log_odds: Tensor) -> Tensor:
        if self._epochs < 0:
            self._visits, self._losses = torch.zeros(2, len(self.table))
        epochs = int(self._visits.min())
        if epochs > self._epochs:
            self._epochs, self._kept = epochs, torch.ones(len(self.table))
            mean, told = self._losses / self._visits.clamp(min=1), int(self.mislabeled.sum())
            self._kept[mean.topk(told if epochs else 0).indices] = 0.0
        self._visits[rows] += 1
        self._losses[rows] += F.softplus(-log_odds)
        return self._kept[rows]


class EM(Arm):
    """Expectation-maximization by the trained model's own margins, as in RE-PO (arXiv 2509.24159).

    E: w = P(the label is correct), by the margin and the rate. M: the rate follows the mean of 1 − w, and the
    loss is −w log σ(z) − (1 − w) log σ(−z), whose slope is (w − σ(z))/σ(−z) times that of −log σ(z). Our own
    reading of it; the rate begins at .1, and moves by a tenth of the way per step.
    """

    rate = 0.1

    def weights(self, rows: Tensor, log_odds: Tensor) -> Tensor:
        right, wrong = torch.sigmoid(log_odds.double()), torch.sigmoid(-log_odds.double())
        w = (1 - self.rate) * right / ((1 - self.rate) * right + self.rate * wrong)
        self.rate += 0.1 * len(w) / self.examples_per_step * float((1 - w).mean() - self.rate)
        return ((w - right) / wrong).float()


class Hoelder(Arm):
    """Hölder-DPO (arXiv 2505.17859), not told the rate; our own reading of it.

    The loss is −(1 + γ) σ(z)^γ + γ σ(z)^(1 + γ), of the Hölder divergences that of density powers, and γ = 2
    as there; its slope is γ (1 + γ) σ(z)^γ σ(−z) times that of −log σ(z).
    """

    gamma = 2.0

    def weights(self, rows: Tensor, log_odds: Tensor) -> Tensor:
        right, wrong = torch.sigmoid(log_odds), torch.sigmoid(-log_odds)
        return self.gamma * (1 + self.gamma) * right**self.gamma * wrong


class RightOnly(Arm):
    """The most that judging could give: told which examples are mislabeled, it trains on none of them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.table.weight = (~self.mislabeled).float()


class Drop(Arm):
    """Without the pairs that are more likely mislabeled than clean, in place of weights."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.table.weight.round_()


class LogOdds(TorchFunctionMode):
    """While it is entered, keeps the log-odds of the labels, [N], in a loss of pairs or of classes."""

    found: Tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.logsigmoid:
            self.found = args[0].detach().float()
        elif func is F.cross_entropy:
            self.found = torch.from_numpy(class_log_odds(args[0].detach().numpy(), args[1].numpy()))
        return func(*args, **kwargs or {})


def judged(mode: str, gate: str = "none", **more: Any) -> dict[str, Any]:
    return {"poprisk_gate": gate, "poprisk_label_noise": mode, **more}


RIVALS = (rivals.lion, rivals.muon, rivals.soap)

# early: by this score of a split of the training data, whose labels are as noisy; risk: early too, by the
# population gain; weights: in place of the judge's; optimizer: in place of AdamW; legs: leaps, each judged
# where the last one ended, with scores in the columns of epochs
ARMS: dict[str, dict[str, Any]] = {
    "adamw": GATES["adamw"],
    "adamw-early": {"poprisk_gate": "none", "early": "accuracy"},
    "adamw-early-loss": {"poprisk_gate": "none", "early": "loss"},
    "adamw-risk": {"poprisk_gate": "none", "poprisk_risk": True},
    **{name: GATES[name] for name in ("hard", "soft", "random-mask", "random-mask-soft")},
}
CLASS_ARMS = {
    "drop-told": judged("weight", weights=DropTold),
    "weight": judged("weight"),
    "weight-shuffled": judged("weight", weights=ShuffledWeights),
    "right-only": judged("weight", weights=RightOnly),
}
PAIR_ARMS = {
    "weight": judged("weight"),
    "weight-shuffled": judged("weight", weights=ShuffledWeights),
    "weight-later": judged("weight", poprisk_judge_after_epochs=1),
    "drop": judged("weight", weights=Drop),
    "right-only": judged("weight", weights=RightOnly),
    "em": judged("weight", weights=EM),
    "hoelder": judged("weight", weights=Hoelder),
    "basis": {"poprisk_gate": "none", "poprisk_basis": "eigen"},
    "basis+weight": judged("weight", poprisk_basis="eigen"),
    **{f"basis+{gate}": GATES[gate] | {"poprisk_basis": "eigen"} for gate in ("hard", "soft", "random-mask")},
    "leap": judged("weight", poprisk_leap=1.0, epochs=0),  # the learning rate does nothing
    "leap-3": judged("weight", poprisk_leap=1.0, epochs=0, legs=3),
    **{make.__name__: {"poprisk_gate": "none", "optimizer": make} for make in RIVALS},
    **{f"{make.__name__}+weight": judged("weight", optimizer=make) for make in (rivals.muon, rivals.soap)},
}
