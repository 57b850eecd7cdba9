"""What the comparison is made of: tasks, the cells that are run, and a run that is ready to start."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sweep
from transformers import Trainer

from hf_poprisk.leave_one_out.judge import RULE
from noisy_labels.arms import ARMS

HELD_OUT = 0.1  # of the training examples: for early stopping, and for validation where a recipe has none


@dataclass(frozen=True)
class Task:
    """What is trained where the command does not say otherwise."""

    epochs: float  # of a YAML file it may be a part of one, which needs --epochs
    learning_rates: tuple[float, ...]
    examples_per_step: int


@dataclass(frozen=True)
class Cell:
    """One run."""

    task: str
    arm: str
    noise: float
    learning_rate: float
    seed: int
    epochs: int

    @property
    def place(self) -> sweep.Row:
        """What its line in the results file begins with; a run by another ``rule`` does not count as this."""
        return asdict(self) | {"rule": RULE if ARMS[self.arm].label_noise != "off" else None}

    def options(self, folder: str) -> dict[str, Any]:
        """The training arguments that all tasks share."""
        arm = ARMS[self.arm]
        return {
            "output_dir": folder,
            "learning_rate": self.learning_rate,
            "num_train_epochs": self.epochs,
            "seed": self.seed,
            "poprisk_gate": arm.gate,
            **({} if arm.alpha is None else {"poprisk_estimator": "ema", "poprisk_ema_alpha": arm.alpha}),
            "poprisk_label_noise": arm.label_noise,
            "disable_tqdm": True,
            "poprisk_risk": arm.risk,
            "logging_strategy": "steps" if arm.risk else "no",
            "logging_steps": 10,
            **dict.fromkeys(("eval_strategy", "save_strategy"), "no"),
        }


@dataclass
class Setup:
    """A run that is ready to start: a trainer, and sets of examples to score."""

    trainer: Trainer
    score: Callable[[str], dict[str, float]]  # name of a set → accuracy, loss, and more of preferences
    wrong: np.ndarray  # [n] bool, of the examples that the trainer was given
    sizes: dict[str, int]  # examples of each set
    every_epoch: list[str]  # sets that are scored after every epoch; the others at the end only


def hold_out(n: int, early: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training examples to train on and to stop early by, ascending."""
    order, count = np.random.default_rng([seed, 2]).permutation(n), round(HELD_OUT * n) if early else 0
    return np.sort(order[count:]), np.sort(order[:count])


def load_rows(path: Path) -> list[sweep.Row]:
    """The finished runs of a results file; of a cell that was run by several rules, by the last one.

    Raises:
        RecipeError: a line that no run has written.
    """
    names = list(Cell.__dataclass_fields__)
    rows = sorted(sweep.load_rows(path, [*names, "rule"]), key=lambda row: row["rule"] or 0)
    return list({sweep.key(row, names): row for row in rows}.values())
