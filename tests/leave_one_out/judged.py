"""A judged run without a training, its data, and the command line."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_poprisk.__main__ import main
from hf_poprisk.leave_one_out import ExampleTable, LabelNoise, NoiseFit

N = 60
WRONG = np.arange(N) % 4 == 1  # a quarter of the labels
FIT = NoiseFit(0.25, 0.15, 0.33, 1.5, 2, -0.55, N)
CHANCE = replace(FIT, log_likelihood=-math.log(2))  # predicts nothing


def log_odds() -> np.ndarray:
    """ζ, mostly negative where the label is wrong; a few are on the other side."""
    generator = np.random.default_rng(1)
    return (generator.normal(1.8, 1.0, N) * np.where(WRONG, -1, 1)).astype(np.float32)


def save_run(
    folder: Path,
    scores: np.ndarray | None = None,
    ids: np.ndarray | None = None,
    fit: NoiseFit = FIT,
    preferences: bool = True,
    never: tuple[int, ...] = (),
    sample: Any = None,
) -> Path:
    """What judging leaves, of pairs or of classes; the rows ``never`` were not judged."""
    scores = log_odds() if scores is None else scores.astype(np.float32)
    table = ExampleTable(np.arange(len(scores)) if ids is None else ids)
    judge = LabelNoise("weight", preferences, table, sample or {})
    judge.fit = fit
    table.judged[:] = torch.tensor([i not in never for i in range(len(scores))])
    table.log_odds = torch.from_numpy(scores) * table.judged
    folder.mkdir(exist_ok=True)
    judge.save(folder)
    return folder


def pairs(flips: bool = True, scores: bool = True) -> Dataset:
    columns: dict[str, Any] = {
        "prompt": [f"prompt {i}" for i in range(N)],
        "chosen": [f"good {i}" for i in range(N)],
        "rejected": [f"bad {i}" for i in range(N)],
    }
    if scores:
        columns |= {
            "score_chosen": [float(i) for i in range(N)],
            "score_rejected": [-float(i) for i in range(N)],
        }
    if flips:
        columns["is_flipped"] = WRONG.tolist()
    return Dataset.from_dict(columns)


def command(capsys: pytest.CaptureFixture[str], *argv: Any, name: str = "audit") -> str:
    """What a command line prints."""
    capsys.readouterr()
    main([name, *map(str, argv)])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: Any, name: str = "audit") -> str:
    """The one sentence of a command line that ends with exit code 2 before anything is printed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([name, *map(str, argv)])
    out, err = capsys.readouterr()
    before, _, said = err.rpartition(f"hf-poprisk {name}: error: ")  # progress bars
    assert stopped.value.code == 2 and out == "" and said.count("\n") == 1 and "error" not in before
    assert said.endswith((".\n", "'hf_poprisk[recipes]'.\n"))
    return said.strip()


def posterior(zeta: float, fit: NoiseFit = FIT) -> float:
    """By the formula, one label at a time."""
    c = math.log(fit.num_labels - 1)
    q = 1 / (1 + math.exp(-(fit.tau * (zeta + c) - c)))
    right = (1 - fit.rate) * q
    return right / (right + fit.rate * (1 - q) / (fit.num_labels - 1))


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}
