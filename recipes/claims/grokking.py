"""Grokking: steps until a network that saw part of a table of an operation modulo p fills in the rest."""

from typing import Any

import torch
from controls import Rows, fit
from torch import Tensor, nn

THRESHOLD = 0.95  # of the held-out pairs
OPTIONS = ("operation", "p", "train_share", "model", "width", "every")
RESULTS = ("validation_steps", "test_steps", "step", "train_accuracy", "validation_accuracy", "test_accuracy")


class Perceptron(nn.Module):
    """Two embeddings of 32 numbers, one hidden layer of 128."""

    def __init__(self, p: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(2 * p, 32)  # the second number has rows of its own
        nn.init.normal_(self.embed.weight, std=0.1)  # with 1 it memorises first, and hardly any arm groks
        self.register_buffer("offset", torch.tensor([0, p]))
        self.layers = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, p))

    def logits(self, pairs: Tensor) -> Tensor:  # [n, 2] → [n, p]
        return self.layers(self.embed(pairs + self.offset).flatten(1))

    def forward(self, pairs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.logits(pairs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Transformer(Perceptron):
    """One block that attends from the second number; no normalisation, as is usual for this task."""

    def __init__(self, p: int, width: int, heads: int = 4) -> None:
        nn.Module.__init__(self)
        self.heads, self.embed, self.position = heads, nn.Embedding(p, width), nn.Embedding(2, width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.unembed = nn.Linear(width, p, bias=False)

    def logits(self, pairs: Tensor) -> Tensor:
        n = len(pairs)
        x = self.embed(pairs) + self.position(torch.arange(2, device=pairs.device).expand(n, 2))
        parts = (
            part(x).view(n, 2, self.heads, -1).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(*parts)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, 2, -1))
        x = x + self.down(torch.relu(self.up(x)))
        return self.unembed(x[:, 1])


def table(operation: str, p: int) -> tuple[Tensor, Tensor]:
    """All pairs [n, 2] and their results [n]; a division has no pairs with b = 0."""
    a, b = (x.flatten() for x in torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij"))
    if operation == "divide":
        a, b = a[b > 0], b[b > 0]
        inverse = torch.tensor([pow(int(x), -1, p) for x in b])
        return torch.stack([a, b], 1), a * inverse % p
    return torch.stack([a, b], 1), (a + b) % p


def run(cell: dict[str, Any]) -> dict[str, Any]:
    """Steps to 95 % on a validation half and a test half of the held-out pairs; None if never."""
    pairs, labels = table(cell["operation"], cell["p"])
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(cell["seed"]))
    count = round(cell["train_share"] * len(pairs))
    parts = {"train": order[:count], "validation": order[count::2], "test": order[count + 1 :: 2]}
    torch.manual_seed(cell["seed"])
    model = {"perceptron": Perceptron, "transformer": Transformer}[cell["model"]](cell["p"], cell["width"])
    reached: dict[str, int] = {}

    @torch.no_grad()
    def measure(step: int) -> dict[str, float] | None:
        if {"validation", "test"} <= set(reached):
            return None
        found = {}
        for name, rows in parts.items():
            right = model.logits(pairs[rows]).argmax(1) == labels[rows]
            found[f"{name}_accuracy"] = right.float().mean().item()
            if found[f"{name}_accuracy"] >= THRESHOLD:
                reached.setdefault(name, step)
        return found

    data = Rows(pairs=pairs[parts["train"]], labels=labels[parts["train"]])
    curves = fit(model, data, cell, measure, cell["every"])
    return {f"{name}_steps": reached.get(name) for name in ("validation", "test")} | curves
