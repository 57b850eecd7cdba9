"""Grokking: steps until a transformer that saw a quarter of the divisions modulo p knows the others."""

from typing import Any

import torch
from experiment import Experiment, Report
from grokking_add import steps_to_grok
from torch import Tensor, nn
from training import GATES, Classifier


class Transformer(Classifier):
    """One block that attends from the second number; no normalisation, as is usual for this task."""

    def __init__(self, p: int, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.embed, self.position = heads, nn.Embedding(p, width), nn.Embedding(2, width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.unembed = nn.Linear(width, p, bias=False)

    def logits(self, x: Tensor) -> Tensor:  # [n, 2] → [n, p]
        n = len(x)
        x = self.embed(x) + self.position(torch.arange(2).expand(n, 2))
        heads = (
            part(x).view(n, 2, self.heads, -1).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, 2, -1))
        x = x + self.down(torch.relu(self.up(x)))
        return self.unembed(x[:, 1])


def divisions(p: int) -> tuple[Tensor, Tensor]:
    """All pairs (a, b), b > 0, [n, 2], and their quotients a/b modulo the prime p, [n]."""
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(1, p))
    inverse = torch.tensor([pow(b, -1, p) for b in pairs[:, 1].tolist()])
    return pairs, pairs[:, 0] * inverse % p


def run(cell: dict[str, Any]) -> dict[str, int | None]:
    return steps_to_grok(Transformer, *divisions(cell["p"]), cell)


EXPERIMENT = Experiment(
    title="Grokking: division modulo 97 at 25 % training data, a transformer",
    verdict="supported only at equal settings, and a mask does as much",
    run=run,
    settings={
        "p": 97,
        "train_share": 0.25,
        "width": 64,
        "examples_per_step": 512,
        "steps": 12000,
        "every": 250,
        "weight_decay": 0.25,
        "adam_beta2": 0.98,
    },
    arms={name: GATES[name] for name in ("adamw", "hard", "soft", "random-mask", "random-mask-soft")},
    grid={"learning_rate": [0.01, 0.03]},
    reports=[Report("validation_steps", "test_steps", "lower", ratio=True)],
    equal={"learning_rate": 0.01},
)
