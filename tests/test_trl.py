"""The TRL trainers: what they look like, and data of which nothing is left."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import trl
from models import preferences
from test_trainer import QUIET
from transformers import Trainer

import hf_poprisk


@pytest.mark.parametrize(
    ("name", "stock"),
    [
        ("", Trainer),
        ("DPO", trl.DPOTrainer),
        ("SFT", trl.SFTTrainer),
        ("Reward", trl.RewardTrainer),
    ],
)
def test_the_signature_is_the_stock_trainers(name: str, stock: type[Any]) -> None:
    ours = getattr(hf_poprisk, f"PopRisk{name}Trainer")
    assert inspect.signature(ours) == inspect.signature(stock)
    assert "train_dataset" in inspect.signature(ours.__init__).parameters

    class Own(ours):
        def __init__(self, extra: int) -> None: ...

    assert list(inspect.signature(Own).parameters) == ["extra"]  # what is not inherited is not hidden


@pytest.mark.parametrize("kind", ["SFT", "DPO", "Reward"])
def test_a_max_length_that_drops_every_row_is_named(kind: str, tmp_path: Path, llama_dir: Path) -> None:
    data = preferences(8)
    if kind == "SFT":
        data = data.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
    trainer = getattr(hf_poprisk, f"PopRisk{kind}Trainer")
    args = getattr(hf_poprisk, f"PopRisk{kind}Config")(
        str(tmp_path), **{**QUIET, "bf16": False, "max_length": 2, "gradient_accumulation_steps": 2}
    )
    sentence = r"^no training example is left of 8: max_length=2 drops them all, so raise max_length\.$"
    with pytest.raises(ValueError, match=sentence):
        trainer(str(llama_dir), args=args, train_dataset=data)
    with pytest.raises(ValueError, match="^train_dataset is empty: give it at least one example"):
        trainer(str(llama_dir), args=args, train_dataset=data.select([]))
