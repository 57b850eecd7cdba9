"""How well preference pairs are judged before training: the noise rate, and which pairs are mislabeled.

A swapped pair has the opposite features, so one pass over the clean pairs serves every noise rate. The rivals
have frozen embeddings in place of gradients: chosen minus rejected, of the last hidden layer, at the last
token or on average over the completion; or they train: a plain epoch on each half of the pairs, labels as
they are, judges the other half, by what it adds to the log-odds of their labels. ``self-influence`` is in a
file of its own.
"""

import tempfile
from collections.abc import Iterator
from typing import Any

import labels_pairs
import numpy as np
import torch
from datasets import Dataset
from experiment import Cell, Experiment, Report
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from torch.utils.data import DataLoader

from hf_poprisk.leave_one_out.features import label_features, num_features, pair_log_odds
from hf_poprisk.leave_one_out.judgement import judge_pairs
from hf_poprisk.leave_one_out.noise import fit_noise

NOISE = (0.0, 0.1, 0.2, 0.3, 0.4)
DRAWS = 5  # of the pairs that are mislabeled
CROSS_TRAINED, CROSS = (0.2, 0.3), {"features": "cross-trained"}  # at this noise, one draw each


def features(cell: Cell) -> list[np.ndarray]:
    """Of the clean training pairs, [n, k] for each part of the model, or of its embeddings."""
    with tempfile.TemporaryDirectory() as folder:
        clean = {"noise": 0.0, "learning_rate": 0.0, "epochs": 1, "poprisk_gate": "none"}
        trainer = labels_pairs.prepare(cell | clean, folder).trainer
        data = trainer.train_dataset

        def some(count: int | None) -> Iterator[Any]:
            return batches(trainer, data if count is None else data.select(range(min(count, len(data)))))

        if cell["features"] == "gradients":
            return label_features(trainer.model, some, pair_log_odds, 2, num_features(len(data))).parts
        return [np.concatenate([embedded(trainer.model, b, cell["features"]) for b in some(None)])]


def batches(trainer: Any, pairs: Dataset) -> Iterator[Any]:
    for batch in DataLoader(pairs, 16, collate_fn=trainer.data_collator):
        yield trainer._prepare_inputs(batch)


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


def cross_trained(cell: Cell, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """What training on the other half adds to the log-odds of each label, [n], and who is mislabeled, [n]."""
    plain, found = {"noise": noise, "epochs": 1, "poprisk_gate": "none"}, []
    for half in (0, 1):
        with tempfile.TemporaryDirectory() as folder:
            trainer = labels_pairs.prepare(cell | plain, folder).trainer
            data = trainer.train_dataset
            held = np.random.default_rng([cell["seed"], 8]).permutation(len(data)) % 2 == half
            trainer.train_dataset, pairs = (data.select(np.flatnonzero(x)) for x in (~held, held))
            before = log_odds(trainer, pairs)
            trainer.train()
            found.append((np.flatnonzero(held), log_odds(trainer, pairs) - before))
    rows, added = (np.concatenate(x) for x in zip(*found, strict=True))
    return added[rows.argsort()], np.array(data["is_flipped"])


@torch.no_grad()
def log_odds(trainer: Any, pairs: Dataset) -> np.ndarray:
    model = trainer.model.eval()
    return torch.cat([pair_log_odds(model, batch) for batch in batches(trainer, pairs)]).numpy()


def run(cell: Cell) -> dict[str, float | None]:
    """Means over the draws of the mislabeled pairs; ``error`` is the largest, ``auroc_least`` the least.

    ``folds`` is the AUROC of a five-fold regression on the same features.
    """
    if "features" not in cell:
        from labels_influence import after_an_epoch  # here, because nothing else needs kronfluence

        return after_an_epoch(cell, DRAWS)
    results, trained = {}, cell["features"] == "cross-trained"
    parts = [] if trained else features(cell)
    for noise in CROSS_TRAINED if trained else NOISE:
        if trained:
            found, mislabeled = cross_trained(cell, noise)
            scores = of_fit(fit_noise(found)) | {"auroc": float(roc_auc_score(mislabeled, -found))}
        else:
            draws = [one_draw(cell, parts, noise, draw) for draw in range(DRAWS if noise else 1)]
            scores = {name: float(np.mean([draw[name] for draw in draws])) for name in draws[0]}
            scores["error"] = max(abs(draw["rate"] - noise) for draw in draws)
            scores["auroc_least"] = min(draw["auroc"] for draw in draws)
        results |= {f"{name}_{100 * noise:g}": value for name, value in scores.items()}
    return results


def one_draw(cell: Cell, parts: list[np.ndarray], noise: float, draw: int) -> dict[str, float]:
    """One draw of the mislabeled pairs, judged by the features of the clean ones."""
    n = len(parts[0])
    mislabeled = np.random.default_rng([cell["seed"], 6, draw]).permutation(n) < round(noise * n)
    labelled = [x * np.where(mislabeled, -1, 1)[:, None].astype(x.dtype) for x in parts]
    found, folds = judge_pairs(labelled), np.nan
    if noise and cell["features"] != "gradients":
        folds = float(roc_auc_score(mislabeled, -cross_validated(labelled[0], draw)))
    return {
        **of_fit(found.fit),
        "below_half": float((found.p_correct < 0.5).mean()),
        "auroc": float(roc_auc_score(mislabeled, -found.log_odds)) if noise else np.nan,
        "folds": folds,
    }


def of_fit(fit: Any) -> dict[str, float]:
    return {"rate": fit.rate, "low": fit.low, "high": fit.high, "likelihood": fit.log_likelihood}


EXPERIMENT = Experiment(
    title="Preference pairs judged before training",
    verdict="mislabeled pairs are found where the model nearly knows the task",
    run=run,
    arms={
        "gradients": {"features": "gradients"},
        "last-state": {"features": "last"},
        "mean-state": {"features": "mean"},
        "self-influence": {},
        **{f"cross-trained-{rate:g}": CROSS | {"learning_rate": rate} for rate in (1e-4, 3e-4, 1e-3)},
    },
    facets={"data": ["dpo", "dpo-words", "sentiment", "writing"]},
    seeds=(0,),
    reports=[Report("auroc_30", "auroc_30", "higher")],
)
