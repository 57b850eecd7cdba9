"""A run whose first step is not finite, in the trainers: it stops, or goes on, and says why."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import Scaler, plain_trainer, spoil

LAYOUTS: dict[str, dict[str, Any]] = {
    "one by one": {},
    "batched": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
    "groups": {"poprisk_estimator": "group"},
    "ema": {"poprisk_estimator": "ema"},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_weights_that_are_nan_stop_the_run_by_name(layout: dict[str, Any], tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path, **layout)
    with torch.no_grad():
        trainer.model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"because model\.layers\.1\.mlp\.up_proj\.weight is not: load"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_first_overflow_of_a_loss_scaler_is_a_clean_skip(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path, max_steps=3, count=12)
    Scaler(trainer)
    spoil(trainer, micro_step=1, factor=float("inf"))
    try:
        trainer.train()
    finally:
        trainer.accelerator.state._mixed_precision = "no"  # the state is shared by all accelerators
    assert {int(entry["step"]) for entry in trainer.optimizer.state_dict()["state"].values()} == {2}
