"""How well preference pairs are judged before training: the noise rate, and which pairs are mislabeled.

A swapped pair has the opposite features, so one pass over the clean pairs serves every noise rate.
"""

import tempfile
from collections.abc import Iterator
from typing import Any

import labels_pairs
import numpy as np
from experiment import Cell, Experiment, Report
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader

from hf_poprisk.leave_one_out.features import label_features, num_features, pair_log_odds
from hf_poprisk.leave_one_out.judgement import judge

NOISE = (0.0, 0.1, 0.2, 0.3, 0.4)
DRAWS = 5  # of the pairs that are mislabeled


def features(cell: Cell) -> list[np.ndarray]:
    """Of the clean training pairs, [n, k] for each part of the model."""
    with tempfile.TemporaryDirectory() as folder:
        clean = {"noise": 0.0, "learning_rate": 0.0, "epochs": 1, "poprisk_gate": "none"}
        trainer = labels_pairs.prepare(cell | clean, folder).trainer
        data = trainer.train_dataset

        def batches(count: int | None) -> Iterator[Any]:
            part = data if count is None else data.select(range(min(count, len(data))))
            for batch in DataLoader(part, 16, collate_fn=trainer.data_collator):
                yield trainer._prepare_inputs(batch)

        return label_features(trainer.model, batches, pair_log_odds, 2, num_features(len(data)))


def run(cell: Cell) -> dict[str, float | None]:
    """Means over the draws of the mislabeled pairs; ``error`` is the largest, ``auroc_least`` the least."""
    parts = features(cell)
    n, results = len(parts[0]), {}
    for noise in NOISE:
        draws: list[dict[str, float]] = []
        for draw in range(DRAWS if noise else 1):
            rng = np.random.default_rng([cell["seed"], 6, draw])
            mislabeled = rng.permutation(n) < round(noise * n)
            found = judge([x * np.where(mislabeled, -1, 1)[:, None].astype(x.dtype) for x in parts])
            draws.append(
                {
                    "rate": found.fit.rate,
                    "low": found.fit.low,
                    "high": found.fit.high,
                    "below_half": float((found.p_correct < 0.5).mean()),
                    "auroc": float(roc_auc_score(mislabeled, -found.log_odds)) if noise else np.nan,
                }
            )
        found = {name: float(np.mean([draw[name] for draw in draws])) for name in draws[0]}
        found["error"] = max(abs(draw["rate"] - noise) for draw in draws)
        found["auroc_least"] = min(draw["auroc"] for draw in draws)
        results |= {f"{name}_{100 * noise:g}": value for name, value in found.items()}
    return results


EXPERIMENT = Experiment(
    title="Preference pairs judged before training",
    verdict="mislabeled pairs are found where the model nearly knows the task",
    run=run,
    arms={"adamw": {"poprisk_gate": "none"}},  # which would be trained next
    facets={"data": ["dpo", "dpo-words"]},
    seeds=(0,),
    reports=[Report("auroc_30", "auroc_30", "higher")],
)
