"""How well preference pairs are judged before training: the noise rate, and which pairs are mislabeled.

A swapped pair has the opposite features, so one pass over the clean pairs serves every noise rate. The rivals
have frozen embeddings in place of gradients: chosen minus rejected, of the last hidden layer, at the last
token or on average over the completion. ``self-influence`` is in a file of its own.
"""

import tempfile
from collections.abc import Iterator
from typing import Any

import labels_pairs
import numpy as np
import torch
from experiment import Cell, Experiment, Report
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from torch.utils.data import DataLoader

from hf_poprisk.leave_one_out.features import label_features, num_features, pair_log_odds
from hf_poprisk.leave_one_out.judgement import judge_pairs

NOISE = (0.0, 0.1, 0.2, 0.3, 0.4)
DRAWS = 5  # of the pairs that are mislabeled


def features(cell: Cell) -> list[np.ndarray]:
    """Of the clean training pairs, [n, k] for each part of the model, or of its embeddings."""
    with tempfile.TemporaryDirectory() as folder:
        clean = {"noise": 0.0, "learning_rate": 0.0, "epochs": 1, "poprisk_gate": "none"}
        trainer = labels_pairs.prepare(cell | clean, folder).trainer
        data = trainer.train_dataset

        def batches(count: int | None) -> Iterator[Any]:
            part = data if count is None else data.select(range(min(count, len(data))))
            for batch in DataLoader(part, 16, collate_fn=trainer.data_collator):
                yield trainer._prepare_inputs(batch)

        if cell["features"] == "gradients":
            return label_features(trainer.model, batches, pair_log_odds, 2, num_features(len(data))).parts
        return [np.concatenate([embedded(trainer.model, b, cell["features"]) for b in batches(None)])]


@torch.no_grad()
def embedded(model: torch.nn.Module, batch: dict[str, torch.Tensor], which: str) -> np.ndarray:
    """[N, hidden size]; which: "last" or "mean" of the completion's tokens."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = model.eval()(**inputs, output_hidden_states=True).hidden_states[-1]
    mask = batch["completion_mask"].bool()
    if which == "last":
        places = torch.arange(mask.shape[1]).expand_as(mask)
        mask = places == places.masked_fill(~mask, -1).amax(1, keepdim=True)
    states = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    chosen, rejected = states.chunk(2)
    return (chosen - rejected).numpy()


def cross_validated(features: np.ndarray, seed: int) -> np.ndarray:
    """Log-odds of the labels by five-fold logistic regression, as cleanlab is given them, [n]."""
    sign = np.random.default_rng(seed).choice([-1, 1], len(features))  # else there is but one class
    x = features * (sign / np.linalg.norm(features, axis=1).mean())[:, None]
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    return sign * cross_val_predict(model, x, sign, cv=5, method="decision_function")


def run(cell: Cell) -> dict[str, float | None]:
    """Means over the draws of the mislabeled pairs; ``error`` is the largest, ``auroc_least`` the least.

    ``folds`` is the AUROC of a five-fold regression on the same features.
    """
    if "features" not in cell:  # self-influence
        from labels_influence import after_an_epoch  # here, because nothing else needs kronfluence

        return after_an_epoch(cell, DRAWS)
    parts = features(cell)
    n, results = len(parts[0]), {}
    for noise in NOISE:
        draws: list[dict[str, float]] = []
        for draw in range(DRAWS if noise else 1):
            rng = np.random.default_rng([cell["seed"], 6, draw])
            mislabeled = rng.permutation(n) < round(noise * n)
            labelled = [x * np.where(mislabeled, -1, 1)[:, None].astype(x.dtype) for x in parts]
            found, folds = judge_pairs(labelled), np.nan
            if noise and cell["features"] != "gradients":
                folds = roc_auc_score(mislabeled, -cross_validated(labelled[0], draw))
            draws.append(
                {
                    "rate": found.fit.rate,
                    "low": found.fit.low,
                    "high": found.fit.high,
                    "below_half": float((found.p_correct < 0.5).mean()),
                    "auroc": float(roc_auc_score(mislabeled, -found.log_odds)) if noise else np.nan,
                    "folds": float(folds),
                }
            )
        mean = {name: float(np.mean([draw[name] for draw in draws])) for name in draws[0]}
        mean["error"] = max(abs(draw["rate"] - noise) for draw in draws)
        mean["auroc_least"] = min(draw["auroc"] for draw in draws)
        results |= {f"{name}_{100 * noise:g}": value for name, value in mean.items()}
    return results


EXPERIMENT = Experiment(
    title="Preference pairs judged before training",
    verdict="mislabeled pairs are found where the model nearly knows the task",
    run=run,
    arms={
        "gradients": {"features": "gradients"},
        "last-state": {"features": "last"},
        "mean-state": {"features": "mean"},
        "self-influence": {},
    },
    facets={"data": ["dpo", "dpo-words", "sentiment", "writing"]},
    seeds=(0,),
    reports=[Report("auroc_30", "auroc_30", "higher")],
)
