"""One training run, from a cell to its results."""

import tempfile
from typing import Any

import common
import numpy as np
from sklearn.metrics import roc_auc_score
from sweep import Row
from transformers import PrinterCallback, TrainerCallback

from hf_poprisk import PopRiskEarlyStoppingCallback
from noisy_labels import classification, preferences
from noisy_labels.arms import ARMS
from noisy_labels.cells import Cell, Setup


class Curves(TrainerCallback):
    """Scores sets of examples after every epoch."""

    def __init__(self, setup: Setup) -> None:
        self._score = setup.score
        self.scores: dict[str, list[dict[str, float]]] = {name: [] for name in setup.every_epoch}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, curve in self.scores.items():
            curve.append(self._score(name))


def run_cell(place: Row) -> Row:
    """Train once; takes the place of a ``Cell`` and returns what came out."""
    cell = Cell(**{name: place[name] for name in Cell.__dataclass_fields__})
    with tempfile.TemporaryDirectory() as folder:
        setup = (classification if cell.task in classification.TASKS else preferences).prepare(cell, folder)
        trainer, timer, curves = setup.trainer, common.StepTimer(), Curves(setup)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(timer)
        trainer.add_callback(curves)
        if ARMS[cell.arm].risk:
            trainer.add_callback(PopRiskEarlyStoppingCallback())
        trainer.train()
    curve = curves.scores
    epoch = min((len(scores) for scores in curve.values()), default=cell.epochs) - 1  # or stopped before
    if (by := ARMS[cell.arm].early) is not None:  # the first of the best
        sign = -1 if by == "loss" else 1
        epoch = int(np.argmax(np.nan_to_num([sign * scores[by] for scores in curve["held"]], nan=-np.inf)))
    final = {name: curve[name][epoch] if name in curve else setup.score(name) for name in setup.sizes}
    per_epoch = {name: [scores["accuracy"] for scores in curve[name]] for name in curve}
    judge, aurocs = trainer._label_noise, {}
    if not isinstance(judge, ARMS[cell.arm].judge or type(judge)):
        raise RuntimeError(f"the judge of {cell.arm} was not the one that it is about")
    if judge is not None and setup.wrong.any():
        table = judge.table
        columns = {"suspicion": -table.columns["log_odds"], "loss_mean": table.columns["loss_mean"]}
        seen = (table.visits > 0).cpu()
        finite = {name: column.cpu()[seen].nan_to_num() for name, column in columns.items()}
        aurocs = {name: float(roc_auc_score(setup.wrong[seen], column)) for name, column in finite.items()}
    return {
        "validation_accuracy": final["validation"]["accuracy"],
        "test_accuracy": final["test"]["accuracy"],
        "test_margin": final["test"].get("margin"),
        "test_kl_per_token": final["test"].get("kl_per_token"),
        "validation_accuracy_per_epoch": per_epoch.get("validation"),
        "test_accuracy_per_epoch": per_epoch.get("test"),
        "reported_epoch": epoch + 1,
        "wrong_fitted": final.get("wrong", {}).get("accuracy"),
        "noise_rate": judge.fit.rate if judge is not None and judge.fits else None,
        "judging_since": None if judge is None else judge.judging_since,
        "auroc_suspicion": aurocs.get("suspicion"),
        "auroc_loss_mean": aurocs.get("loss_mean"),
        "sizes": {"train": len(trainer.train_dataset), **setup.sizes},
        "steps": trainer.state.global_step,
        "seconds_per_step": timer.median,
    }
