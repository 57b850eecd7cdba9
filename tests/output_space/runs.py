"""Small recorded runs: a regression with closed forms, trained by a stock trainer or ours."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments
from hf_poprisk.output_space import OutputSpaceCallback, Recording, SquaredError, load_recording
from hf_poprisk.output_space.analysis import Analysis

N, M = 12, 5  # probe and test examples


class HalfSquared(SquaredError):
    """½ |u − y|², for which a mode of the kernel decays as exp(−λt/n)."""

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return (outputs - batch["labels"].reshape(outputs.shape)).square().sum(1) / 2


class Regression(nn.Module):
    """A network with the half squared loss, in float64."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers).double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        predictions = self.body(x)
        error = (predictions - labels.reshape(predictions.shape)).square()
        return {"loss": error.sum(1).mean() / 2, "logits": predictions}


def network(width: int = 4) -> Regression:
    return Regression(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))


def examples(count: int, inputs: int = 3, outputs: int = 1) -> list[dict[str, Tensor]]:
    return [
        {"x": torch.randn(inputs).double(), "labels": torch.randn(outputs).double()} for _ in range(count)
    ]


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    common = {"output_dir": str(folder), "per_device_train_batch_size": N, "lr_scheduler_type": "constant"}
    common |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "max_grad_norm": 0.0}
    return common | settings


def recorder(
    probe: list[Any], test: list[Any], steps: Any = 1, task: Any = None, **more: Any
) -> OutputSpaceCallback:
    batches = ([{k: v[None] for k, v in row.items()} for row in rows] for rows in (probe, test))
    return OutputSpaceCallback(task or HalfSquared(), *batches, steps, **more)


def train(
    folder: Path,
    model: nn.Module,
    data: list[Any],
    *callbacks: Any,
    optimizers: Any = (None, None),
    resume: str | None = None,
    **settings: Any,
) -> Recording | None:
    """Train with full batches by SGD, or as ``settings`` say; what was recorded, if anything was."""
    ours = settings.get("optim") == "poprisk_adamw" or any(name.startswith("poprisk") for name in settings)
    kind, options = (PopRiskTrainer, PopRiskTrainingArguments) if ours else (Trainer, TrainingArguments)
    args = options(**arguments(folder, **{"optim": "sgd", "max_steps": 4, **settings}))
    trainer = kind(model, args, train_dataset=data, callbacks=list(callbacks), optimizers=optimizers)
    trainer.train(resume_from_checkpoint=resume)
    return load_recording(folder) if callbacks else None


def flat(recording: Recording, name: str, record: int = 0) -> Tensor:
    return recording.series[name][record].reshape(-1).double()


def displacement(recording: Recording, first: int = 0, last: int = -1, name: str = "test_outputs") -> Tensor:
    """[N] or [M]: how far the outputs went."""
    return flat(recording, name, last) - flat(recording, name, first)


def predicted(recording: Recording) -> Tensor:
    """[M]: how far the test outputs were to go."""
    return Analysis(recording).transfer[-1]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
