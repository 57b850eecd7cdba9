"""A classifier, its data, and trainers that judge labels."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from models import SILENT, WORDS, preferences, text, trl_trainer_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments

QUIET: dict[str, Any] = {**SILENT, "poprisk_gate": "none"}
LABELS = 3
KNOWN, OTHER = sorted(set(WORDS))[::2], sorted(set(WORDS))[1::2]


class Classifier(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, LABELS)).to(dtype)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def examples(count: int = 60, wrong: float = 0.0, seed: int = 0) -> list[dict[str, Tensor]]:
    """Three well separated clouds; the first ``wrong · count`` labels are of another one."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % LABELS
    x = torch.randn(count, 6, generator=generator) + 4.0 * F.one_hot(labels, 6)
    other = torch.randint(1, LABELS, (count,), generator=generator)
    labels[: round(wrong * count)] = ((labels + other) % LABELS)[: round(wrong * count)]
    return [{"x": x[i], "labels": labels[i]} for i in range(count)]


def classify(tmp_path: Path, data: Any, model: nn.Module | None = None, **options: Any) -> PopRiskTrainer:
    settings = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        **QUIET,
        **options,
    }
    of_eval = settings.pop("eval_dataset", None)
    args = PopRiskTrainingArguments(str(tmp_path), **settings)
    model = Classifier() if model is None else model
    return PopRiskTrainer(model, args=args, train_dataset=data, eval_dataset=of_eval)


def prefer(kind: str, folder: str | Path, tmp_path: Path, data: Any = None, **options: Any) -> Any:
    settings = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "gradient_checkpointing": False}
    settings |= {"train_sampling_strategy": "random", **QUIET, **options}
    return trl_trainer_of(kind, str(folder), tmp_path, preferences(60) if data is None else data, **settings)


def planted(count: int = 61) -> tuple[Dataset, np.ndarray]:
    """Pairs that differ by a word, and which of them are swapped."""
    flips = np.random.default_rng(0).random(count) < 0.25
    words = ("signal keeps pointing the same way", "noise has no sign that holds")
    rows = [words[::-1] if flip else words for flip in flips]
    prompts = preferences(count)["prompt"][:]
    chosen, rejected = ([f" {row[side]}" for row in rows] for side in (0, 1))
    return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected}), flips


def learnable(count: int = 60, wrong: float = 0.2) -> Dataset:
    """Chosen is mostly of one half of the words, rejected of the other; some pairs are flipped."""
    rng = np.random.default_rng(0)

    def completion(usual: list[str], others: list[str]) -> str:
        return "".join(" " + rng.choice(usual if rng.random() < 0.9 else others) for _ in range(6))

    pairs = [[completion(KNOWN, OTHER), completion(OTHER, KNOWN)] for _ in range(count)]
    flipped = rng.permutation(count) < wrong * count
    sides = [pair[::-1] if flip else pair for pair, flip in zip(pairs, flipped, strict=True)]
    return Dataset.from_dict(
        {
            "prompt": [text(i, 3) for i in range(count)],
            "chosen": [side[0] for side in sides],
            "rejected": [side[1] for side in sides],
            "is_flipped": flipped,
        }
    )


def conversations(count: int = 60) -> Dataset:
    def talk(row: dict[str, str], side: str) -> list[dict[str, str]]:
        said = (("user", row["prompt"]), ("assistant", row[side]))
        return [{"role": role, "content": content} for role, content in said]

    rows = learnable(count)
    return Dataset.from_dict({side: [talk(row, side) for row in rows] for side in ("chosen", "rejected")})


def labelled(count: int = 60) -> Dataset:
    """Texts of four lengths, mostly of a third of the words; some labels are of another class."""
    rng, words = np.random.default_rng(0), sorted(set(WORDS))
    true = np.arange(count) % 3
    flipped = rng.permutation(count) < 0.2 * count
    labels = np.where(flipped, (true + rng.integers(1, 3, count)) % 3, true)
    texts = [
        " ".join(rng.choice(words[c::3] if rng.random() < 0.9 else words) for _ in range(8 + 3 * (i % 4)))
        for i, c in enumerate(true)
    ]
    rows = Dataset.from_dict({"text": texts, "label": labels, "is_flipped": flipped, "margin": labels / 2})
    return rows.cast_column("label", ClassLabel(names=["north", "south", "west"]))


def weights(trainer: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def drawn(count: int, rate: float, labels: int, tau: float = 1.0, seed: int = 0) -> tuple[Any, Any]:
    """ζ of calibrated predictions (after ``tau``), and which label was replaced."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, labels)) * 4
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    true = (p.cumsum(1) > rng.random((count, 1))).argmax(1)
    wrong = rng.random(count) < rate
    observed = np.where(wrong, (true + rng.integers(1, labels, count)) % labels, true)
    q = p[np.arange(count), observed]
    c = math.log(labels - 1)
    return (np.log(q / (1 - q)) + c) / tau - c, wrong


def first_gradients(trainer: Any) -> dict[str, Tensor]:
    """Filled when it trains: the gradients before its first step."""
    found: dict[str, Tensor] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                named = trainer.model.named_parameters()
                found.update({n: p.grad.clone() for n, p in named if p.grad is not None})

    trainer.add_callback(Look())
    return found
