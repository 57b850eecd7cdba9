"""Self-influence of preference pairs under EKFAC, by kronfluence: the usual detector of wrong labels.

Before training a pair's is the same with either label, so it is taken after one epoch of plain AdamW on the
labels as they are. Beside it the loss of each pair, at the same weights.
"""

import tempfile
from typing import Any

import labels_pairs
import numpy as np
import torch
from experiment import Cell
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PrinterCallback

NOISE = 0.3
EPOCH = {"noise": NOISE, "learning_rate": 1e-4, "epochs": 1, "poprisk_gate": "none"}


class OnePair(Task):
    """DPO's loss of one pair, of which the two texts are two forwards through the same layers, unpadded."""

    def __init__(self, trainer: Any) -> None:
        head = trainer.model.get_output_embeddings()  # one side is the vocabulary: left out, as is usual
        linear = ((name, m) for name, m in trainer.model.named_modules() if isinstance(m, nn.Linear))
        self.beta, self.layers = trainer.beta, [name for name, module in linear if module is not head]

    def get_influence_tracked_modules(self) -> list[str]:
        return self.layers

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The reward margin z, [1]; batch as TRL's DPO collates one pair."""
        log_p = []
        for row in range(2):  # chosen, rejected
            ids, kept = (batch[name][row] for name in ("input_ids", "completion_mask"))
            ids, kept = (x[batch["attention_mask"][row].bool()] for x in (ids, kept.bool()))
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            log_p.append(-F.cross_entropy(logits[kept[1:]], ids[1:][kept[1:]], reduction="sum"))
        return self.beta * (log_p[0] - log_p[1] - batch["ref_chosen_logps"] + batch["ref_rejected_logps"])

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        z = self.compute_measurement(batch, model)
        if sample:  # a label of the model's own, for the Fisher matrix
            z = torch.where(torch.rand_like(z) < z.sigmoid(), z, -z)
        return -F.logsigmoid(z).sum()


@torch.no_grad()
def losses(trainer: Any) -> np.ndarray:
    """Of every training pair, with its label as it is, [n]."""
    task, collate = OnePair(trainer), trainer.data_collator
    found = [task.compute_train_loss(collate([row]), trainer.model) for row in trainer.train_dataset]
    return torch.stack(found).numpy()


def self_influence(trainer: Any, strategy: str = "ekfac") -> np.ndarray:
    """Of every training pair, with its label as it is, [n]. Wraps the model.

    The damping is a tenth of the mean eigenvalue (Grosse et al., arXiv 2308.03296).
    """
    task, data = OnePair(trainer), trainer.train_dataset
    one = {"dataloader_kwargs": DataLoaderKwargs(collate_fn=trainer.data_collator)}
    with tempfile.TemporaryDirectory() as folder:
        model = prepare_model(trainer.model, task)
        analyzer = Analyzer("pairs", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        shared = FactorArguments(strategy=strategy, has_shared_parameters=True)
        analyzer.fit_all_factors("f", data, per_device_batch_size=1, factor_args=shared, **one)
        args = ScoreArguments(damping_factor=None)
        analyzer.compute_self_scores("s", "f", data, per_device_train_batch_size=1, score_args=args, **one)
        return analyzer.load_self_scores("s")["all_modules"].numpy()


def after_an_epoch(cell: Cell, draws: int) -> dict[str, float | None]:
    """The AUROC of self-influence, and of the loss as ``folds``; every draw is a seed of the training."""
    found = []
    for seed in range(cell["seed"], cell["seed"] + draws):
        with tempfile.TemporaryDirectory() as folder:
            setup = labels_pairs.prepare(cell | EPOCH | {"seed": seed}, folder)
            setup.trainer.remove_callback(PrinterCallback)
            setup.trainer.train()
            scores = losses(setup.trainer), self_influence(setup.trainer)
            found.append([roc_auc_score(setup.mislabeled, score) for score in scores])
    folds, area = np.array(found).T
    results = {"auroc": area.mean(), "folds": folds.mean(), "auroc_least": area.min()}
    return {f"{name}_{100 * NOISE:g}": float(value) for name, value in results.items()}
