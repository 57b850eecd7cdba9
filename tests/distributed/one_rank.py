"""What each rank of ``test_one_rank.py`` does: training where the data or the model of rank 1 is at fault.

Imported once, before the ranks are forked from it. Not a test module.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fully_sharded import join
from losses import OwnLoss
from models import layout, trainer_of
from per_example.test_factors import random_factors, run_of
from per_example.test_self_check import Classifier, Labelled, rows
from sharded_trainers import WRAPPED, accelerate_shards
from torch import Tensor
from transformers import default_data_collator

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments
from hf_poprisk.per_example import one_by_one
from hf_poprisk.per_example.basis import complete_bases, measure_bases


def mine() -> bool:
    return dist.get_rank() == 1


def joined(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = default_data_collator(features)
    return {k: v[:1] for k, v in batch.items()} if mine() else batch


def with_more(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = default_data_collator(features)
    return {**batch, "more": torch.zeros(5 if mine() else len(features))}


class Own(Classifier):
    """Of rank 1 alone: rows that a layer cannot see, or a mean over the examples."""

    def __init__(self, fault: str = "") -> None:
        super().__init__(hidden=fault == "hidden" and mine())
        self.centred = fault == "centred" and mine()

    def forward(self, x: Tensor, labels: Tensor, more: Any = None) -> dict[str, Tensor]:
        if not self.centred:
            return super().forward(x, labels)
        h = self.first(x)
        logits = self.last((h - h.mean(0)).tanh()).mean(1)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class Checkpointed(Own):
    gradient_checkpointing = True


class Drifting(PopRiskTrainer):
    """A loss that is another one at every call, on rank 1."""

    calls = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += mine()
        return super().compute_loss(*args, **kwargs) * (1 + self.calls)


class Later(OwnLoss):
    """In the first step the micro-batch of rank 0 has no gradient."""

    def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
        outputs = model(**inputs)
        return outputs["loss"] * float(mine() or self.state.global_step), outputs


def run(folder: Path, model: Any, trainer: Any = PopRiskTrainer, wrong: bool = False, **options: Any) -> Any:
    """How training ended: its sentence, or whether the examples went in one backward."""
    options |= {"max_steps": 2, "remove_unused_columns": False, **layout(4, 4)}
    part = one_by_one.part_of
    with pytest.MonkeyPatch.context() as patch:
        if wrong:
            patch.setattr(one_by_one, "part_of", lambda *args: 1.5 * part(*args))
        built = trainer_of(folder, rows(16), model, (trainer, PopRiskTrainingArguments), **options)
        try:
            built.train()
        except ValueError as error:
            return str(error)
    assert built._paths_checked
    return built._layers is not None


def sharded(folder: Path, trainer: Any = PopRiskTrainer, **options: Any) -> Any:
    options |= {"fsdp": True, "fsdp_config": dict(WRAPPED), **layout(2, 2)}
    with accelerate_shards():
        built = trainer_of(folder, None, None, (trainer, PopRiskTrainingArguments), **options)
        try:
            built.train()
        except ValueError as error:
            return str(error)


def bases(folder: Path) -> dict[str, Any]:
    """Of three layers, two of which one rank alone reaches; and what a pass on rank 1 refuses."""
    factors = random_factors()
    own = {"wide", "tall"} if mine() else {"short", "tall"}
    parts = {k: tuple(x[dist.get_rank() :: 2] for x in v) for k, v in factors.items()}
    run_own = run_of({k: parts[k] if k == "tall" else factors[k] for k in own})
    found: dict[str, Any] = {"complete": complete_bases(run_own), "leading": measure_bases(run_own)}

    def refusing(see: Any) -> None:
        run_own(see)
        if mine():
            raise ValueError("rank 1 does not see the rows.")

    for name, measure in (("complete", complete_bases), ("leading", measure_bases)):
        with pytest.raises(ValueError) as caught:
            measure(refusing)
        found[f"refused, {name}"] = str(caught.value)
    return found


CASES: dict[str, Callable[[Path], Any]] = {
    "collator": lambda folder: run(folder, Own(), data_collator=joined),
    "inputs": lambda folder: run(folder, Checkpointed(), data_collator=with_more),
    "loss": lambda folder: run(folder, Own(), Drifting),
    "model": lambda folder: run(folder, Own("centred")),
    "rows": lambda folder: run(folder, Own("hidden")),
    "no gradient": lambda folder: run(folder, Own(), Later),
    "no gradient, one by one": lambda folder: run(folder, Labelled(conv=True), Later),
    "no gradient, wrong": lambda folder: run(folder, Labelled(conv=True), Later, wrong=True),
    "bases": bases,
    "sharded, collator": partial(sharded, data_collator=joined),
    "sharded, loss": partial(sharded, trainer=Drifting),
}


def main(rank: int, world: int, port: int, folder: Path) -> None:
    """In a process of its own."""
    join(rank, world, port)
    torch.save({name: case(folder / name) for name, case in CASES.items()}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
