"""How much of an example's log-odds is its own doing: the estimate, beside models that never saw it.

    python recipes/held_out.py --task gauss10 --noise 0.3 --learning_rate 0.003 --seeds 0 1 2

trains on all examples, scoring them (``poprisk_label_noise=audit``), and then without a part of them at a
time. For each example the difference of its log-odds is what it taught the model itself, and what of it the
others did not undo. The table compares that, after every epoch, with the estimate (a share of the effect of
the example's own steps, for good), with the same effect halved at each visit, and with nothing; the estimate
of the share of wrong labels and how they are ranked likewise. Models without a part of the data are a little
worse on it for that alone, which counts as own effect here: more parts, less of that.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import common
import numpy as np
import torch
import transformers
from comparison import markdown
from noisy_labels import classification, preferences
from noisy_labels.cells import Cell, Setup
from sklearn.metrics import roc_auc_score
from sweep import ends_in_a_sentence
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback

from hf_poprisk.leave_one_out import fit_noise
from hf_poprisk.leave_one_out.log_odds import LogOddsTap

TASKS = classification.TASKS | preferences.TASKS
HEADER = [
    "epoch",
    "own effect, right labels",
    "wrong labels",
    "estimate",
    "explained by it",
    "explained if halved",
    "best share",
]


@dataclass
class Run:
    """What is known of the examples after each epoch, [epochs, n]."""

    log_odds: np.ndarray
    own_effect: np.ndarray  # the estimate
    wrong: np.ndarray  # [n]
    num_labels: int
    kept: float  # the share of the effect of its own steps that the estimate takes to stay


class Watch(TrainerCallback):
    """Calls a function at the end of every epoch and keeps what it returns."""

    def __init__(self, look: Callable[[], Any]) -> None:
        self._look: Callable[[], Any] = look
        self.seen: list[Any] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(self._look())


@torch.no_grad()
def log_odds(trainer: Any, data: Sequence[Any], pairs: bool) -> tuple[np.ndarray, int]:
    """z of the labels of ``data``, [n], as the loss of the trainer sees them, and K."""
    model, found, size = trainer.model, [], trainer.args.per_device_eval_batch_size
    model.eval()
    for start in range(0, len(data), size):
        rows = [data[row] for row in range(start, min(start + size, len(data)))]
        tap = LogOddsTap(pairs, lambda z, num_labels: torch.ones_like(z))
        with tap:
            trainer.compute_loss(model, trainer._prepare_inputs(trainer.data_collator(rows)))
        found.append(tap.log_odds.cpu())
    model.train()
    return torch.cat(found).double().numpy(), tap.num_labels


def train(cell: Cell, left_out: np.ndarray) -> Run:
    """One run, and its log-odds of the examples that were left out; of all, if none was."""
    pairs = cell.task in preferences.TASKS
    with tempfile.TemporaryDirectory() as folder:
        setup: Setup = (preferences if pairs else classification).prepare(cell, folder)
        trainer, data = setup.trainer, setup.trainer.train_dataset
        rows = left_out if len(left_out) else np.arange(len(setup.wrong))
        if len(data) != len(setup.wrong):
            raise common.RecipeError(f"{cell.task}: the trainer left out examples of its own.")
        if len(left_out):
            trainer.train_dataset = chosen(data, np.setdiff1d(np.arange(len(data)), left_out))
        looked = chosen(data, rows)
        watched = [Watch(lambda: log_odds(trainer, looked, pairs))]
        if not len(left_out):
            columns = trainer._label_noise.table.columns
            watched.append(Watch(lambda: columns["self_influence"].cpu().double().numpy()))
        trainer.remove_callback(PrinterCallback)
        for watch in watched:
            trainer.add_callback(watch)
        transformers.set_seed(cell.seed)
        trainer.train()
    log, num_labels = zip(*watched[0].seen, strict=True)
    own = watched[1].seen if len(watched) > 1 else []
    judge = trainer._label_noise
    return Run(
        np.array(log), np.array(own), setup.wrong[rows], num_labels[0], judge.kept_share if judge else np.nan
    )


def chosen(data: Any, rows: np.ndarray) -> Any:
    return data.select(rows) if hasattr(data, "select") else [data[row] for row in rows]


def compare(cell: Cell, folds: int) -> list[list[float]]:
    """The numbers of one seed: [epochs][columns]."""
    everything = train(cell, np.array([], dtype=int))
    n = len(everything.wrong)
    order, without = np.random.default_rng([cell.seed, 3]).permutation(n), np.empty_like(everything.log_odds)
    for fold in tqdm(range(folds), unit="part", desc=f"seed {cell.seed}"):
        part = np.sort(order[fold::folds])
        without[:, part] = train(Cell(**vars(cell) | {"arm": "adamw"}), part).log_odds
    steps = np.diff(everything.own_effect, axis=0, prepend=0) / everything.kept  # of each epoch
    halved, out = np.zeros(n), []
    for epoch in range(len(steps)):
        halved = halved / 2 + steps[epoch]
        z, estimate, total = (
            everything.log_odds[epoch],
            everything.own_effect[epoch],
            steps[: epoch + 1].sum(0),
        )
        own = z - without[epoch]
        right, wrong = own[~everything.wrong].mean(), own[everything.wrong].mean() if cell.noise else np.nan
        shares = [1 - np.square(own - c).sum() / np.square(own).sum() for c in (estimate, halved)]
        numbers = [epoch + 1, right, wrong, estimate.mean(), *shares, total @ own / (total @ total)]
        for score in (without[epoch], z - estimate, z - halved, z):
            numbers.append(fit_noise(score, everything.num_labels).rate)
            numbers.append(roc_auc_score(~everything.wrong, score) if cell.noise else np.nan)
        out.append(numbers)
    return out


def table(seeds: list[list[list[float]]]) -> str:
    """Markdown, means over the seeds, at the epochs 1, 2, 4, … and the last; – without wrong labels."""
    scores = ("without it", "estimate", "halved", "as seen")
    header = HEADER + [f"{name}: ε̂, AUROC" for name in scores]
    lines = []
    for row in (means := np.mean(seeds, axis=0)):
        if row[0] < len(means) and row[0] not in 2 ** np.arange(10):
            continue
        shown = ["–" if np.isnan(x) else f"{x:.2f}" for x in row[1:7]]
        pairs = [
            f"{rate:.2f}" + ("" if np.isnan(auc) else f", {auc:.3f}") for rate, auc in row[7:].reshape(-1, 2)
        ]
        lines.append([f"{row[0]:.0f}", *shown, *pairs])
    return markdown(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--noise", type=float, default=0.3, help="share of wrong labels")
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--folds", type=int, default=6, help="parts that are left out in turn")
    parser.add_argument("--epochs", type=int, help="default: 20, and 4 for dpo")
    args = parser.parse_args()
    with ends_in_a_sentence(parser):
        epochs = TASKS[args.task].epochs if args.epochs is None else args.epochs
        if not (0 <= args.noise < 0.5 and args.learning_rate > 0 and args.folds > 1 and epochs > 0):
            raise common.RecipeError("0 ≤ --noise < 0.5, --learning_rate > 0, --folds > 1 and --epochs > 0.")
        cells = [
            Cell(args.task, "audit", args.noise, args.learning_rate, seed, epochs) for seed in args.seeds
        ]
        preferences.check(cell for cell in cells if args.task in preferences.TASKS)
        transformers.utils.logging.set_verbosity_error()
        print(table([compare(cell, args.folds) for cell in cells]))


if __name__ == "__main__":
    main()
