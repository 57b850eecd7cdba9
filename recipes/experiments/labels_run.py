"""One run with mislabeled examples, from a cell to its results."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import RecipeError
from experiment import Cell
from labels_arms import Arm, LogOdds
from sklearn.metrics import roc_auc_score
from torch import Tensor
from training import masked
from transformers import PrinterCallback, Trainer, TrainerCallback

from hf_poprisk import PopRiskEarlyStoppingCallback

HELD_OUT = 0.1  # of the training examples: for early stopping, and for validation where a recipe has none


@dataclass
class Setup:
    """A run that is ready to start: a trainer, and sets of examples to score."""

    trainer: Trainer
    score: Callable[[str], dict[str, float]]  # name of a set → accuracy, loss, and more of preferences
    mislabeled: np.ndarray  # [n] bool, of the examples that the trainer was given
    sets: list[str]
    every_epoch: list[str]  # sets that are scored after every epoch; the others at the end only


def hold_out(n: int, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """Training examples to train on and to stop early by, ascending."""
    order = np.random.default_rng([cell["seed"], 2]).permutation(n)
    count = round(HELD_OUT * n) if cell.get("early") else 0
    return np.sort(order[count:]), np.sort(order[:count])


def training_arguments(cell: Cell, folder: str) -> dict[str, Any]:
    """Those that classes and pairs share."""
    off = {"poprisk_label_noise": "off", "poprisk_risk": False}
    gate = off | {name: value for name, value in cell.items() if name.startswith("poprisk_")}
    return {
        "output_dir": folder,
        "learning_rate": cell["learning_rate"],
        "seed": cell["seed"],
        **gate,
        "disable_tqdm": True,
        "logging_strategy": "steps" if gate["poprisk_risk"] else "no",
        "logging_steps": 10,
        **dict.fromkeys(("eval_strategy", "save_strategy"), "no"),
    }


def trainer_class(base: Any, cell: Cell, mislabeled: np.ndarray) -> Any:
    """The trainer with the arm's own weights and optimizer; ``mislabeled``: [n] bool, of its examples."""

    base = masked(base) if cell.get("random_mask") else base

    class ArmTrainer(base):
        _arm: Arm | None = None

        def judge_labels(self) -> Any:
            found = super().judge_labels()
            if "weights" in cell:
                told = torch.from_numpy(mislabeled)
                self._arm = cell["weights"](self._weights, told, self.args.units_per_step)
            return found

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if self._arm is None:
                return super().compute_loss(*args, **kwargs)
            with LogOdds() as self._log_odds:
                return super().compute_loss(*args, **kwargs)

        def _weights_of(self, rows: Tensor) -> Tensor:
            if self._arm is None:
                return super()._weights_of(rows)
            return self._arm.weights(rows, self._log_odds.found)

        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            if "optimizer" not in cell:
                return super().create_optimizer(model)
            if self.args.weight_decay:
                raise RecipeError(f"{cell['arm']} is run without weight decay: set weight_decay to 0.")
            self.optimizer = cell["optimizer"](self.model, self.args.learning_rate)
            return self.optimizer

    return ArmTrainer


class Curves(TrainerCallback):
    """Scores sets of examples after every epoch."""

    def __init__(self, setup: Setup) -> None:
        self._score = setup.score
        self.scores: dict[str, list[dict[str, float]]] = {name: [] for name in setup.every_epoch}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, curve in self.scores.items():
            curve.append(self._score(name))


def run_cell(cell: Cell, prepare: Callable[[Cell, str], Setup], epochs: int = 0) -> dict[str, float | None]:
    """Train once; accuracies are on clean labels, ``mislabeled_fitted`` on mislabeled ones as labeled.

    Args:
        epochs: so many columns hold the test accuracy after each epoch.
    """
    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(cell, folder)
        trainer, curves = setup.trainer, Curves(setup)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(curves)
        if cell.get("poprisk_risk"):
            trainer.add_callback(PopRiskEarlyStoppingCallback())
        trainer.train()
        for leg in range(cell.get("legs", 0)):  # the first of them is made
            if leg:
                trainer._label_noise.forget()
                trainer._judge_and_leap()
            curves.on_epoch_end(trainer.args, trainer.state, trainer.control)
    curve, epoch = curves.scores, -1
    if by := cell.get("early"):  # the first of the best
        sign = -1 if by == "loss" else 1
        epoch = int(np.argmax(np.nan_to_num([sign * scores[by] for scores in curve["held"]], nan=-np.inf)))
    tested = [scores["accuracy"] for scores in curve.get("test", ())]
    judge, auroc = trainer._label_noise, None
    if trainer.state.global_step or judge.leapt:
        final = {name: curve[name][epoch] if curve.get(name) else setup.score(name) for name in setup.sets}
    else:  # the model is as it was, which has no preference
        final = {name: {"accuracy": None} for name in setup.sets}
    if judge is not None and setup.mislabeled.any():
        seen = judge.table.judged.cpu()
        auroc = float(roc_auc_score(setup.mislabeled[seen], -judge.table.log_odds.cpu()[seen]))
    return {
        "validation_accuracy": final["validation"]["accuracy"],
        "test_accuracy": final["test"]["accuracy"],
        # of the epoch that is best on test, which nobody can choose
        "test_accuracy_best": max(tested, default=None),
        "test_kl_per_token": final["test"].get("kl_per_token"),
        "mislabeled_fitted": final.get("mislabeled", {}).get("accuracy"),
        "noise_rate": judge.fit.rate if judge is not None else None,
        "below_half": float((judge.p_correct() < 0.5).mean()) if judge is not None else None,
        "auroc_suspicion": auroc,
        **{f"test_accuracy_{k + 1}": tested[k] if k < len(tested) else None for k in range(epochs)},
    }
