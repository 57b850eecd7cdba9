"""Self-influence: how much of an example's log-odds is its own doing, beside models that never saw it.

A cell trains on all examples, scoring them (``poprisk_label_noise=audit``), and then without a part of them
at a time. For each example the difference of its log-odds is what it taught the model itself, and what of it
the others did not undo. That is compared with the estimate (a share of the effect of the example's own
steps, for good), with the same effect halved at each visit, and with nothing; the estimate of the share of
mislabeled examples and how they are ranked likewise. Models without a part of the data are a little worse on
it for that alone, which counts as self-influence here: more parts, less of that.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import common
import labels_classes
import numpy as np
import pandas as pd
import torch
import transformers
from experiment import Cell, Experiment, Report
from sklearn.metrics import roc_auc_score
from tables import markdown
from transformers import PrinterCallback, TrainerCallback

from hf_poprisk.leave_one_out import fit_noise
from hf_poprisk.leave_one_out.during import KEPT
from hf_poprisk.leave_one_out.log_odds import LogOddsTap

COLUMNS = {  # results → headings; nats, and shares of the squared effects
    "influence_clean": "self-influence, clean",
    "influence_mislabeled": "mislabeled",
    "estimate": "estimate",
    "explained": "explained by it",
    "explained_halved": "explained if halved",
    "best_share": "best share",
}
SCORES = {"without": "without it", "estimate": "estimate", "halved": "halved", "seen": "as seen"}


@dataclass
class Run:
    """What is known of the examples after training."""

    log_odds: np.ndarray  # [n]
    self_influence: np.ndarray  # [epochs, n], the estimate after each epoch
    mislabeled: np.ndarray  # [n]
    num_labels: int
    kept: float  # the share of the effect of its own steps that the estimate takes to stay


class OwnEffects(TrainerCallback):
    """Keeps the estimate of every example at the end of every epoch."""

    def __init__(self, trainer: Any) -> None:
        self._trainer, self.seen = trainer, []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(self._trainer._label_noise.table.columns["self_influence"].cpu().double().numpy())


@torch.no_grad()
def log_odds(trainer: Any, data: Sequence[Any]) -> tuple[np.ndarray, int]:
    """z of the labels of ``data``, [n], as the loss of the trainer sees them, and K."""
    with LogOddsTap(False, lambda z, num_labels: torch.ones_like(z)) as tap:
        trainer.compute_loss(trainer.model.eval(), trainer._prepare_inputs(trainer.data_collator(data)))
    return tap.log_odds.cpu().double().numpy(), tap.num_labels


def train(cell: Cell, left_out: np.ndarray) -> Run:
    """One run, and its log-odds of the examples that were left out; of all, if none was."""
    judged = not len(left_out)
    with tempfile.TemporaryDirectory() as folder:
        judging = {"poprisk_label_noise": "audit" if judged else "off"}
        setup = labels_classes.prepare(cell | judging, folder)
        trainer, data = setup.trainer, setup.trainer.train_dataset
        everything = np.arange(len(data))
        rows = everything if judged else left_out
        trainer.remove_callback(PrinterCallback)
        effects = OwnEffects(trainer)
        if judged:
            trainer.add_callback(effects)
        else:
            trainer.train_dataset = [data[row] for row in np.setdiff1d(everything, left_out)]
        transformers.set_seed(cell["seed"])
        trainer.train()
        z, num_labels = log_odds(trainer, [data[row] for row in rows])
    kept = KEPT if judged else np.nan
    return Run(z, np.array(effects.seen), setup.mislabeled[rows], num_labels, kept)


def run(cell: Cell) -> dict[str, float | None]:
    """The numbers after the last epoch: ``COLUMNS``, and of each score ε̂ (``rate_``) and AUROC (``auroc_``).

    Raises:
        RecipeError: fewer than two parts.
    """
    if cell["folds"] < 2:
        raise common.RecipeError("folds must be at least 2: parts of the data are left out in turn.")
    everything = train(cell, np.array([], dtype=int))
    z, mislabeled, estimate = everything.log_odds, everything.mislabeled, everything.self_influence[-1]
    order, without = np.random.default_rng([cell["seed"], 3]).permutation(len(z)), np.empty_like(z)
    for fold in range(cell["folds"]):
        part = np.sort(order[fold :: cell["folds"]])
        without[part] = train(cell, part).log_odds
    halved = np.zeros(len(z))
    steps = np.diff(everything.self_influence, axis=0, prepend=0) / everything.kept  # of each epoch
    for step in steps:
        halved = halved / 2 + step
    own, total = z - without, steps.sum(0)
    found = {
        "influence_clean": own[~mislabeled].mean(),
        "influence_mislabeled": own[mislabeled].mean() if mislabeled.any() else None,
        "estimate": estimate.mean(),
        "explained": 1 - np.square(own - estimate).sum() / np.square(own).sum(),
        "explained_halved": 1 - np.square(own - halved).sum() / np.square(own).sum(),
        "best_share": total @ own / (total @ total),
    }
    for name, score in zip(SCORES, (without, z - estimate, z - halved, z), strict=True):
        found[f"rate_{name}"] = fit_noise(score, everything.num_labels).rate
        found[f"auroc_{name}"] = roc_auc_score(~mislabeled, score) if mislabeled.any() else None
    return {name: None if value is None else float(value) for name, value in found.items()}


def table(rows: pd.DataFrame) -> str:
    """Markdown: means over the seeds, a line for each number of epochs."""
    header = ["epochs", *COLUMNS.values(), *(f"{title}: ε̂, AUROC" for title in SCORES.values())]
    lines = []
    for epochs, part in rows.groupby("epochs"):
        mean = {name: fmean(part[name]) for name in part.columns if name.startswith(("rate_", "auroc_"))}
        line = [str(epochs), *(f"{fmean(part[name]):.2f}" for name in COLUMNS)]
        lines.append(line + [f"{mean[f'rate_{s}']:.2f}, {mean[f'auroc_{s}']:.3f}" for s in SCORES])
    return markdown(header, lines)


EXPERIMENT = Experiment(
    title="What an example teaches the model itself, beside models that never saw it",
    verdict="a share of the effect of its own steps stays",
    run=run,
    settings={"folds": 6},
    arms={"adamw": {"poprisk_gate": "none"}},
    facets={"data": ["gauss10"], "noise": [0.3], "learning_rate": [0.003], "epochs": [1, 2, 4, 8, 16, 20]},
    seeds=(0, 1, 2),
    reports=[Report("explained", "explained", "higher")],
)
