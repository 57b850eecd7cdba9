"""poprisk_weight_column against the textbook: the examples' own gradients, times their weights, summed."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import transformers
from datasets import Dataset
from losses import FirstGradient, gap
from models import layout, preferences, sequences, tiny_model, trainer_of, trl_trainer_of
from models import rows as token_rows
from peft import LoraConfig
from test_trainer import Record, textbook
from torch import Tensor

WEIGHTS = [0.5, 2.0, 0.0, 1.0, 0.25, 3.0, 0.125, 1.5]
COLUMN = {"poprisk_weight_column": "w"}
LORA = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
TOLERANCE = 2e-5


def data_of(kind: str) -> Dataset:
    if kind == "Trainer":
        return Dataset.from_list(token_rows(8))
    return sequences(8) if kind == "SFT" else preferences(8)


def make(kind: str, folder: Path, model: Any = None, **options: Any) -> Any:
    """A trainer of any kind, with weights unless told otherwise."""
    data = options.pop("data", None)
    data = data_of(kind) if data is None else data
    if options.get("poprisk_weight_column") == "w" and "w" not in data.column_names:
        data = data.add_column("w", WEIGHTS)
    options = {"max_steps": 1, "max_grad_norm": 0.0, **options}
    if kind == "Trainer":
        return trainer_of(folder, data, model, **options)
    return trl_trainer_of(kind, model, folder, data, **options)


def first_gradient(make: Callable[..., Any], **options: Any) -> tuple[dict[str, Tensor], Any]:
    grab = FirstGradient()
    trainer = make(callbacks=[grab], **options)
    trainer.train()
    return grab.gradient, trainer


def weighted(gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {n: sum(w * h[n] for w, h in zip(WEIGHTS, gradients, strict=True)) for n in gradients[0]}


@pytest.fixture(scope="module")
def expected(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The examples' own gradients, as the stock trainer's loss gives them one at a time."""
    found: dict[str, Any] = {}

    def of(kind: str, **options: Any) -> list[dict[str, Tensor]]:
        name = f"{kind} {options}"
        if name not in found:
            folder = tmp_path_factory.mktemp("textbook")
            model = tiny_model() if kind == "Trainer" else str(llama_dir)
            torch.manual_seed(0)
            trainer = make(kind, folder, model, **layout(1), optim="adamw_torch", **options)
            found[name] = textbook(trainer, [8], per_token=kind in ("Trainer", "SFT"))[0]
        return found[name]

    return of


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Trainer": ("Trainer", {}),
    "SFT": ("SFT", {}),
    "SFT by dft": ("SFT", {"loss_type": "dft"}),
    "SFT with the logits": ("SFT", {"label_smoothing_factor": 0.1}),
    "Reward": ("Reward", {}),
    "Reward, centred": ("Reward", {"center_rewards_coefficient": 0.1}),
    "DPO": ("DPO", {}),
    "DPO with adapters": ("DPO", {"peft_config": LORA}),
    "DPO, checkpointed": ("DPO", {"gradient_checkpointing": True}),
    **{f"DPO by {loss}": ("DPO", {"loss_type": loss}) for loss in ("ipo", "hinge", "robust", "sigmoid_norm")},
}
CASES["DPO by robust"][1]["label_smoothing"] = 0.1
WAYS = {
    "gate": {},
    "gate, one by one": {},
    "no gate": {"poprisk_gate": "none"},
    "groups": {"poprisk_estimator": "group"},
    "adamw": {"optim": "adamw_torch"},
    "sgd": {"optim": "sgd"},
}


@pytest.mark.parametrize("size", [8, 2, 1])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_weighted_sum(
    case: str, way: str, size: int, llama_dir: Path, tmp_path: Path, expected: Any
) -> None:
    kind, options = CASES[case]
    if (way, size) == ("groups", 8):
        size = 4  # two groups
    model = tiny_model() if kind == "Trainer" else str(llama_dir)

    def build(**more: Any) -> Any:
        torch.manual_seed(0)
        trainer = make(kind, tmp_path, model, **layout(size), **options, **more)
        if way.endswith("one by one"):
            trainer._prepare_layers = lambda optimizer: trainer._say_one_by_one("the test that wants it")
        return trainer

    got, trainer = first_gradient(build, **WAYS[way], **COLUMN)
    assert (trainer._layers is not None) == (way == "gate" and size > 1)
    assert gap(got, weighted(expected(kind, **options))) < TOLERANCE
