"""Fine-tuning a small language model to say which library a docstring is from, with noisy labels.

The model of ``scripts/prepare_tiny.py`` and docstrings of Python's standard library, which differ between
Python versions.
"""

import ast
import itertools
import sysconfig
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from experiment import Experiment, Report
from training import GATES, Rows, fit
from transformers import AutoModelForSequenceClassification, AutoTokenizer

LIBRARIES = ("tkinter", "asyncio", "email", "importlib")
SIZES = {"train": 512, "validation": 200, "test": 320}


def docstrings() -> dict[str, list[tuple[str, int]]]:
    """Docstrings of six words or more and their library, as many of each, in a fixed random order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {library: set() for library in LIBRARIES}
    for library, texts in found.items():
        for path in sorted((root / library).rglob("*.py")):
            if "test" in path.relative_to(root).parts:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                    words = (ast.get_docstring(node) or "").split()
                    if len(words) >= 6:
                        texts.add(" ".join(words))
    rng, most = np.random.default_rng(0), sum(SIZES.values()) // len(LIBRARIES)
    rows = [
        (text, label)
        for label, texts in enumerate(found.values())
        for text in rng.permutation(sorted(texts))[:most]
    ]
    order = iter(rng.permutation(len(rows)))
    return {name: [rows[i] for i in itertools.islice(order, size)] for name, size in SIZES.items()}


def run(cell: dict[str, Any]) -> dict[str, Any]:
    """Accuracy on clean validation and test labels, and on the mislabeled texts (what was memorised).

    ``early`` keeps 10 % of the noisy labels apart and reports the epoch at which their loss is lowest.
    """
    common.require_path(cell["model"], "model")
    tokenizer = AutoTokenizer.from_pretrained(cell["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    sets, form = {}, {"truncation": True, "max_length": cell["max_length"], "padding": "max_length"}
    for name, rows in docstrings().items():
        texts, labels = zip(*rows, strict=True)
        tokens = tokenizer([str(text) for text in texts], return_tensors="pt", **form)
        sets[name] = dict(tokens) | {"labels": torch.tensor(labels)}
    rng, labels = np.random.default_rng(cell["seed"]), sets["train"]["labels"].numpy()
    n, classes = len(labels), int(labels.max()) + 1
    mislabeled = rng.permutation(n)[: round(cell["noise"] * n)]
    labels[mislabeled] = (labels[mislabeled] + rng.integers(1, classes, len(mislabeled))) % classes
    held = rng.permutation(n)[: n // 10 if cell.get("early") else 0]
    kept = np.setdiff1d(np.arange(n), held)
    train = sets.pop("train")
    sets["mislabeled"] = pick(train, np.setdiff1d(mislabeled, held))
    torch.manual_seed(cell["seed"])
    model = AutoModelForSequenceClassification.from_pretrained(
        cell["model"], num_labels=classes, dtype=torch.float32
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    steps = len(kept) // cell["examples_per_step"]

    @torch.no_grad()
    def measure(step: int) -> dict[str, float]:
        model.eval()
        found = {}
        for name, part in sets.items():
            right = []
            for rows in torch.arange(len(part["labels"])).split(128):
                batch = pick(part, rows)
                right += [batch.pop("labels") == model(**batch).logits.argmax(1)]
            found[f"{name}_accuracy"] = torch.cat(right).float().mean().item()
        if len(held):
            found["held"] = model(**pick(train, held)).loss.item()
        model.train()
        return found

    options = cell | {"steps": cell["epochs"] * steps, "every": steps}
    curves = fit(model, Rows(**pick(train, kept)), options, measure)
    return {f"{name}_accuracy": curves[f"{name}_accuracy"][-1] for name in sets}


def pick(part: dict[str, torch.Tensor], rows: Any) -> dict[str, torch.Tensor]:
    return {name: column[rows] for name, column in part.items()}


EXPERIMENT = Experiment(
    title="Mislabeled texts: fine-tuning a language model as a classifier, 30 % mislabeled",
    verdict="not supported here",
    run=run,
    settings={"model": "outputs/tiny/model", "max_length": 24, "noise": 0.3}
    | {"examples_per_step": 16, "epochs": 6},
    arms={
        **{name: options for name, options in GATES.items() if name != "ema-soft"},
        "weight": {"poprisk_gate": "none", "poprisk_label_noise": "weight"},
    },
    grid={"learning_rate": [0.0003, 0.001, 0.003]},
    reports=[Report("validation_accuracy", "test_accuracy", "higher")],
    equal={"learning_rate": 0.001},
    columns={"mislabeled_accuracy": "mislabeled fitted"},
)
