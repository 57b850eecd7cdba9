"""Classification: handwritten digits and Gaussian clusters, by a small perceptron."""

from dataclasses import dataclass

import numpy as np
import torch
import transformers
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments
from noisy_labels.arms import ARMS, trainer_class
from noisy_labels.cells import Cell, Setup, Task, hold_out

RATES = (3e-4, 1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Classes(Task):
    """The data of a task, and which labels are wrong."""

    num_train: int
    shape: tuple[int, int, int]  # classes, clusters of each, dimensions
    wrong: str = "uniform"  # another label at random; the next "class"; a "group" of neighbours, the next one


TASKS = {
    "digits": Classes(20, RATES, 48, 900, (10, 0, 64)),
    "digits-class": Classes(20, RATES, 48, 900, (10, 0, 64), "class"),
    "digits-group": Classes(20, RATES, 48, 900, (10, 0, 64), "group"),
    "gauss10": Classes(20, RATES, 64, 1024, (10, 3, 32)),
    "gauss6": Classes(20, RATES, 48, 1200, (6, 4, 24)),
}


class Classifier(nn.Module):
    """A perceptron with two hidden layers of 96."""

    def __init__(self, dimensions: int, classes: int) -> None:
        super().__init__()
        hidden = (nn.Linear(dimensions, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU())
        self.layers = nn.Sequential(*hidden, nn.Linear(96, classes))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def draw(task: str, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Inputs [n, d] and clean labels [n] of the training, validation and test sets."""
    rng, n = np.random.default_rng([seed, 0]), TASKS[task].num_train
    if task.startswith("digits"):
        x, y = load_digits(return_X_y=True)
        order, end = rng.permutation(len(y)), n + 300
        x, y = x[order] / 16, y[order]
        x = (x - x[:n].mean(0)) / (x[:n].std(0) + 0.1)  # some pixels are always empty
    else:
        classes, clusters, dimensions = TASKS[task].shape
        means, end = rng.normal(size=(classes * clusters, dimensions)), n + 1000
        cluster = rng.integers(len(means), size=end + 3000)
        x, y = means[cluster] + rng.normal(size=(len(cluster), dimensions)), cluster % classes
    parts = {"train": slice(n), "validation": slice(n, end), "test": slice(end, None)}
    return {name: (x[rows].astype(np.float32), y[rows]) for name, rows in parts.items()}


def spoil(x: np.ndarray, labels: np.ndarray, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n] of which a share is wrong, and which ones [n] are."""
    task, rng, n = TASKS[cell.task], np.random.default_rng([cell.seed, 1]), len(labels)
    step = rng.integers(1, task.shape[0], size=n) if task.wrong == "uniform" else 1
    other, order = (labels + step) % task.shape[0], rng.permutation(n)
    if task.wrong == "group":
        order = np.square(x - x[order[0]]).sum(1).argsort()
    wrong = order.argsort() < round(cell.noise * n)
    return np.where(wrong, other, labels), wrong


def prepare(cell: Cell, folder: str) -> Setup:
    """The trainer of a cell, on labels of which its share is wrong."""
    arm, task, sets = ARMS[cell.arm], TASKS[cell.task], draw(cell.task, cell.seed)
    x, clean = sets.pop("train")
    labels, wrong = spoil(x, clean, cell)
    kept, held = hold_out(len(x), arm.early is not None, cell.seed)
    sets |= {name: (x[i], labels[i]) for name, i in (("wrong", kept[wrong[kept]]), ("held", held))}
    tensors = {name: [torch.from_numpy(a) for a in part] for name, part in sets.items() if len(part[1])}

    transformers.set_seed(cell.seed)
    model = Classifier(task.shape[2], task.shape[0])
    args = PopRiskTrainingArguments(
        **cell.options(folder),
        per_device_train_batch_size=task.examples_per_step,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
    )
    trainer = trainer_class(PopRiskTrainer, arm, cell.noise, wrong[kept])(
        model=model,
        args=args,
        train_dataset=[{"x": torch.from_numpy(x[i]), "labels": torch.tensor(labels[i])} for i in kept],
        data_collator=torch.utils.data.default_collate,
    )

    @torch.no_grad()
    def score(name: str) -> dict[str, float]:
        inputs, truth = tensors[name]
        found = model(inputs, truth)
        right = found["logits"].argmax(1) == truth
        return {"accuracy": right.float().mean().item(), "loss": found["loss"].item()}

    sizes = {name: len(truth) for name, (_, truth) in tensors.items()}
    return Setup(trainer, score, wrong[kept], sizes, list(sizes))
