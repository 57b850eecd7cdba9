"""Classes with mislabeled examples: handwritten digits and Gaussian clusters, by a small perceptron."""

from dataclasses import dataclass

import numpy as np
import torch
import transformers
from experiment import Cell, Experiment, Report
from labels_arms import ARMS, CLASS_ARMS
from labels_run import Setup, hold_out, run_cell, trainer_class, training_arguments
from sklearn.datasets import load_digits
from torch import nn
from training import Classifier

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments


@dataclass(frozen=True)
class Data:
    """Sizes, and which examples are mislabeled."""

    num_train: int
    batch: int
    classes: int
    dimensions: int
    clusters: int = 0  # of each class
    noise: str = "uniform"  # another class at random; the next "class"; a "group" of neighbours, the next


DATA = {
    "digits": Data(900, 48, 10, 64),
    "digits-class": Data(900, 48, 10, 64, noise="class"),
    "digits-group": Data(900, 48, 10, 64, noise="group"),
    "gauss10": Data(1024, 64, 10, 32, clusters=3),
    "gauss6": Data(1200, 48, 6, 24, clusters=4),
}

TITLES = {
    "digits": "digits",
    "digits-class": "digits, all to the next class",
    "digits-group": "digits, a group of neighbours mislabeled",
    "gauss10": "10 classes of Gaussian clusters",
    "gauss6": "6 classes of Gaussian clusters",
}


class Network(Classifier):
    """A perceptron with two hidden layers of 96."""

    def __init__(self, dimensions: int, classes: int) -> None:
        super().__init__()
        hidden = (nn.Linear(dimensions, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU())
        self.layers = nn.Sequential(*hidden, nn.Linear(96, classes))


def draw(name: str, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Inputs [n, d] and clean labels [n] of the training, validation and test sets."""
    rng, data = np.random.default_rng([seed, 0]), DATA[name]
    n = data.num_train
    if not data.clusters:
        x, y = load_digits(return_X_y=True)
        order, end = rng.permutation(len(y)), n + 300
        x, y = x[order] / 16, y[order]
        x = (x - x[:n].mean(0)) / (x[:n].std(0) + 0.1)  # some pixels are always empty
    else:
        means, end = rng.normal(size=(data.classes * data.clusters, data.dimensions)), n + 1000
        cluster = rng.integers(len(means), size=end + 3000)
        x, y = means[cluster] + rng.normal(size=(len(cluster), data.dimensions)), cluster % data.classes
    parts = {"train": slice(n), "validation": slice(n, end), "test": slice(end, None)}
    return {part: (x[rows].astype(np.float32), y[rows]) for part, rows in parts.items()}


def spoil(x: np.ndarray, labels: np.ndarray, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n] of which a share is of another class, and which ones [n]."""
    data, rng, n = DATA[cell["data"]], np.random.default_rng([cell["seed"], 1]), len(labels)
    step = rng.integers(1, data.classes, size=n) if data.noise == "uniform" else 1
    other, order = (labels + step) % data.classes, rng.permutation(n)
    if data.noise == "group":
        order = np.square(x - x[order[0]]).sum(1).argsort()
    mislabeled = order.argsort() < round(cell["noise"] * n)
    return np.where(mislabeled, other, labels), mislabeled


def prepare(cell: Cell, folder: str) -> Setup:
    """The trainer of a cell, with its share of mislabeled examples."""
    data, sets = DATA[cell["data"]], draw(cell["data"], cell["seed"])
    x, clean = sets.pop("train")
    labels, mislabeled = spoil(x, clean, cell)
    kept, held = hold_out(len(x), cell)
    sets |= {name: (x[i], labels[i]) for name, i in (("mislabeled", kept[mislabeled[kept]]), ("held", held))}
    tensors = {name: [torch.from_numpy(a) for a in part] for name, part in sets.items() if len(part[1])}

    transformers.set_seed(cell["seed"])
    model = Network(data.dimensions, data.classes)
    args = PopRiskTrainingArguments(
        **training_arguments(cell, folder),
        num_train_epochs=cell["epochs"],
        per_device_train_batch_size=data.batch,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
    )
    trainer = trainer_class(PopRiskTrainer, cell, mislabeled[kept])(
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

    return Setup(trainer, score, mislabeled[kept], list(tensors), list(tensors))


EXPERIMENT = Experiment(
    title="Mislabeled examples: digits and Gaussian clusters, a perceptron",
    verdict="the gate gains what a random mask gains; judging labels gains 3 to 8 points",
    run=lambda cell: run_cell(cell, prepare),
    settings={"epochs": 20},
    arms={**ARMS, **CLASS_ARMS},
    facets={"data": list(DATA), "noise": [0.0, 0.2, 0.3, 0.4]},
    grid={"learning_rate": [0.0001, 0.0003, 0.001, 0.0015, 0.003, 0.01]},
    reports=[Report("validation_accuracy", "test_accuracy", "higher")],
)
