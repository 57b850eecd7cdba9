"""Grokking: steps until a perceptron that saw part of the table of an addition modulo p fills in the rest."""

from typing import Any

import torch
from experiment import Experiment, Report
from torch import Tensor, nn
from training import GATES, Classifier, Rows, fit

THRESHOLD = 0.95  # of the held-out pairs


class Perceptron(Classifier):
    """Two embeddings of 32 numbers, one hidden layer of 128."""

    def __init__(self, p: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(2 * p, 32)  # the second number has rows of its own
        nn.init.normal_(self.embed.weight, std=0.1)  # with 1 it memorises first, and hardly any arm groks
        self.register_buffer("offset", torch.tensor([0, p]))
        self.layers = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, p))

    def logits(self, x: Tensor) -> Tensor:  # [n, 2] → [n, p]
        return self.layers(self.embed(x + self.offset).flatten(1))


def steps_to_grok(
    model_class: Any, pairs: Tensor, labels: Tensor, cell: dict[str, Any]
) -> dict[str, int | None]:
    """Steps to 95 % on a validation half and a test half of the held-out pairs; None if never.

    Args:
        model_class: taking p and a width, with ``logits`` of pairs.
        pairs: [n, 2] and their results ``labels`` [n], of which a share is trained on.
    """
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(cell["seed"]))
    count = round(cell["train_share"] * len(pairs))
    parts = {"train": order[:count], "validation": order[count::2], "test": order[count + 1 :: 2]}
    torch.manual_seed(cell["seed"])
    model = model_class(cell["p"], cell["width"])
    reached: dict[str, int] = {}

    @torch.no_grad()
    def measure(step: int) -> dict[str, float] | None:
        if {"validation", "test"} <= set(reached):
            return None
        for name in ("validation", "test"):
            right = model.logits(pairs[parts[name]]).argmax(1) == labels[parts[name]]
            if right.float().mean() >= THRESHOLD:
                reached.setdefault(name, step)
        return {}

    data = Rows(x=pairs[parts["train"]], labels=labels[parts["train"]])
    fit(model, data, cell, measure)
    return {f"{name}_steps": reached.get(name) for name in ("validation", "test")}


def run(cell: dict[str, Any]) -> dict[str, int | None]:
    pairs = torch.cartesian_prod(torch.arange(cell["p"]), torch.arange(cell["p"]))
    return steps_to_grok(Perceptron, pairs, pairs.sum(1) % cell["p"], cell)


EXPERIMENT = Experiment(
    title="Grokking: addition modulo 53, a perceptron",
    verdict="not supported here",
    run=run,
    settings={
        "p": 53,
        "train_share": 0.4,
        "width": 128,
        "examples_per_step": 280,
        "steps": 1000,
        "every": 25,
        "adam_beta2": 0.98,
    },
    arms={name: GATES[name] for name in ("adamw", "hard", "soft", "ema-soft", "random-mask")},
    grid={"learning_rate": [0.05, 0.1, 0.2], "weight_decay": [0.25, 0.5, 1.0]},
    reports=[Report("validation_steps", "test_steps", "lower", ratio=True)],
    equal={"learning_rate": 0.1, "weight_decay": 0.5},
)
