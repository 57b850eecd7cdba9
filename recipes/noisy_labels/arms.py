"""The arms: AdamW, the gates, what others do against wrong labels, and controls of the judging."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import common
import numpy as np
import torch
from controls import RandomMaskAdamW
from torch import Tensor

from hf_poprisk import PopRiskAdamW
from hf_poprisk.leave_one_out import LabelNoise


class ShuffledWeights(LabelNoise):
    """Control: each example gets the weight of its neighbour in the (shuffled) micro-batch."""

    def sample_weight(self, visit: Any, log_odds: Tensor, num_labels: int) -> Tensor:
        super().sample_weight(visit, log_odds, num_labels)
        if len(visit.weight) < 2:
            raise common.RecipeError("weight-shuffled needs two examples or more in every forward.")
        visit.weight = visit.weight.roll(1)
        return visit.weight


class NothingHeldOut(LabelNoise):
    """Control: the effect of an example's own steps is never subtracted, C = 0."""

    def sample_weight(self, visit: Any, log_odds: Tensor, num_labels: int) -> Tensor:
        self.table.columns["self_influence"].zero_()
        return super().sample_weight(visit, log_odds, num_labels)


class DropTold(LabelNoise):
    """From the second epoch on without the share, told, with the largest mean loss of the epochs before."""

    told = 0.0  # the share of wrong labels
    never_seen = 0  # examples that the trainer does without: TRL those whose prompt fills max_length
    _epochs = -1

    def sample_weight(self, visit: Any, log_odds: Tensor, num_labels: int) -> Tensor:
        super().sample_weight(visit, log_odds, num_labels)
        epochs = int(self.table.visits.kthvalue(self.never_seen + 1).values)
        loss = self.table.columns["loss_mean"]
        if epochs > self._epochs:
            self._epochs, self._kept = epochs, torch.ones_like(loss)
            self._kept[loss.topk(round(self.told * len(loss)) if epochs else 0).indices] = 0.0
        visit.weight = self._kept[visit.rows]
        return visit.weight


class RightOnly(LabelNoise):
    """The most that judging could give: told which labels are wrong, it trains on none of them."""

    def sample_weight(self, visit: Any, log_odds: Tensor, num_labels: int) -> Tensor:
        super().sample_weight(visit, log_odds, num_labels)
        visit.weight = (~self.wrong[visit.rows]).float()
        return visit.weight


@dataclass(frozen=True)
class Arm:
    gate: str = "none"
    label_noise: str = "off"
    judge: type[LabelNoise] | None = None
    optimizer: type[PopRiskAdamW] | None = None
    early: str | None = None  # by this score of a split of the training data, whose labels are as noisy
    risk: bool = False  # early too, by the population gain
    alpha: float | None = None  # of the streaming form; None: the exact gate
    losses: Callable[[float], dict[str, float]] = lambda noise: {"sigmoid": 1.0}  # and their weights
    dpo_only: bool = False


def conservative(noise: float) -> dict[str, float]:
    """-(1-ε) log σ(z) - ε log σ(-z) out of TRL's losses: its ``sigmoid`` takes no label_smoothing."""
    return {"sigmoid": 2 * (1 - noise), "robust": -(1 - 2 * noise)}


ARMS = {
    "adamw": Arm(),
    "adamw-early": Arm(early="accuracy"),
    "adamw-early-loss": Arm(early="loss"),
    "adamw-risk": Arm(risk=True),
    "hard": Arm(gate="hard"),
    "soft": Arm(gate="soft"),
    "ema-soft": Arm(gate="soft", alpha=1 / 19, dpo_only=True),  # (1-beta1)/(1+beta1)
    "ema-soft-1": Arm(gate="soft", alpha=1.0, dpo_only=True),  # as published
    "random-mask": Arm(gate="hard", optimizer=RandomMaskAdamW),
    "random-mask-soft": Arm(gate="soft", optimizer=RandomMaskAdamW),  # as dense as the soft gate
    "audit": Arm(label_noise="audit"),
    "drop-told": Arm(label_noise="audit", judge=DropTold),
    "robust": Arm(losses=lambda noise: {"robust": 1.0}, dpo_only=True),
    "conservative": Arm(losses=conservative, dpo_only=True),
    "ipo": Arm(losses=lambda noise: {"ipo": 1.0}, dpo_only=True),
    "weight": Arm(label_noise="weight"),
    "swap": Arm(label_noise="swap", dpo_only=True),
    "weight+soft": Arm(gate="soft", label_noise="weight"),
    "weight-shuffled": Arm(label_noise="weight", judge=ShuffledWeights),
    "weight-C0": Arm(label_noise="weight", judge=NothingHeldOut),
    "right-only": Arm(label_noise="audit", judge=RightOnly),
}


def trainer_class(base: Any, arm: Arm, noise: float, wrong: np.ndarray) -> Any:
    """The trainer with the arm's own judge and optimizer in it; ``wrong``, [n] bool, are its examples."""

    class ArmTrainer(base):
        def _new_judge(self, *args: Any) -> LabelNoise:
            plain = super()._new_judge(*args)
            if arm.judge is None:
                return plain
            judge = arm.judge(plain.mode, plain.preferences, plain.table, plain.sample)
            judge.told, judge.wrong = noise, torch.from_numpy(wrong).to(plain.table.device)
            judge.never_seen = len(plain.table) - len(self.train_dataset)
            return judge

        @staticmethod
        def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
            stock, kwargs = base.get_optimizer_cls_and_kwargs(args, model)
            return arm.optimizer or stock, kwargs

    return ArmTrainer
