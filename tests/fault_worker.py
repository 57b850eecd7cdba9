"""A model whose examples can be faulty, and what its checkpoints must be."""

from pathlib import Path
from typing import Any

import torch
from models import SILENT, layout
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments, load_record
from hf_poprisk.checkpoints import damage, newest_checkpoint


class Fragile(nn.Module):
    """Squared error of two layers; an example's loss and its gradient are multiplied by its factors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 1024), nn.Linear(1024, 4)

    def forward(
        self, x: Tensor, labels: Tensor, loss_factor: Tensor, grad_factor: Tensor
    ) -> dict[str, Tensor]:
        """x, labels: [batch, 4]; the factors: [batch]."""
        hidden = self.first(x)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * grad_factor[:, None])
        output = self.second(hidden)
        return {"loss": ((output - labels).square().mean(-1) * loss_factor).mean(), "logits": output}


def examples(count: int, faulty: int = -1, **factors: float) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = [{name: torch.randn(4, generator=generator) for name in ("x", "labels")} for _ in range(count)]
    for i, row in enumerate(rows):
        given = factors if i == faulty else {}
        row |= {name: torch.tensor(given.get(name, 1.0)) for name in ("loss_factor", "grad_factor")}
    return rows


def build(folder: str | Path, data: Any, **options: Any) -> PopRiskTrainer:
    """Steps of four examples, a checkpoint after each."""
    defaults = {**SILENT, "save_strategy": "steps", "save_steps": 1, "max_steps": 3, **layout(1, 4)}
    defaults |= {"lr_scheduler_type": "linear", "train_sampling_strategy": "sequential"}
    args = PopRiskTrainingArguments(str(folder), **{**defaults, **options})
    return PopRiskTrainer(Fragile(), args=args, train_dataset=data)


def state_of(checkpoint: Path) -> list[Tensor]:
    """Weights, moments and step counts."""
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    entries = [torch.as_tensor(value) for entry in state.values() for value in entry.values()]
    return [*load_file(checkpoint / "model.safetensors").values(), *entries]


def assert_complete(output_dir: Path, steps: list[int]) -> None:
    """Just these checkpoints are whole, hold finite numbers and their record, and can be resumed from."""
    found = sorted(int(p.name.split("-")[1]) for p in output_dir.glob("checkpoint-*") if damage(p) is None)
    assert found == steps
    for step in steps:
        checkpoint = output_dir / f"checkpoint-{step}"
        assert all(x.isfinite().all() for x in state_of(checkpoint))
        assert load_record(checkpoint).config["steps"] == step
    assert newest_checkpoint(output_dir) == output_dir / f"checkpoint-{steps[-1]}"


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert text.endswith(".") and "\n" not in text and len(text) < 500
    return text
