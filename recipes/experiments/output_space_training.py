"""Full-batch training of small networks with a recording in output space, and what is read from it."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_poprisk.output_space import OutputSpaceCallback, SquaredError, cumulative, load_recording

OUTPUTS = Path("outputs/output_space")
Rows = list[dict[str, Tensor]]


class Regressor(nn.Module):
    """Any network, with the loss of transformers' regression heads."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body.double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"loss": F.mse_loss(logits, labels.reshape(logits.shape)), "logits": logits}


def rows(x: Tensor, y: Tensor) -> Rows:
    return [{"x": a, "labels": b} for a, b in zip(x.double(), y.double(), strict=True)]


def together(examples: Rows) -> Rows:
    """One batch of all: such small networks spend their time between operations."""
    return [torch.utils.data.default_collate(examples)]


def train(
    name: str,
    model: nn.Module,
    data: tuple[Rows, Rows],
    rate: float,
    steps: int,
    directions: dict[str, Tensor],
    records: int = 25,
    **settings: Any,
) -> Path:
    """Full-batch training, recorded at steps that are evenly spaced in log time."""
    folder = OUTPUTS / name
    when = {0, *(round(steps ** (i / (records - 1))) for i in range(records - 1))}
    callback = OutputSpaceCallback(
        SquaredError(), together(data[0]), together(data[1]), when, 256, directions
    )
    settings = {"optim": "sgd", "max_grad_norm": 0.0, **settings}
    args = TrainingArguments(
        output_dir=str(folder),
        learning_rate=rate,
        max_steps=steps,
        per_device_train_batch_size=len(data[0]),
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = Trainer(model, args, train_dataset=data[0], callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return folder


def seen_at_test(folder: Path, direction: str, than: str) -> list[float]:
    """How much a unit of one direction moves test outputs, against a unit of another, from record two on."""
    recording = load_recording(folder)
    vectors = [recording.directions[name].reshape(-1).double() for name in (direction, than)]
    found = []
    for evolution in cumulative(recording)[1:]:
        one, other = (float((evolution.transfer @ v).norm() / v.norm()) for v in vectors)
        found.append(one / other)
    return found


def gone(folder: Path, direction: str) -> list[float]:
    """At each record, the share of the squared error along a direction that training has dissipated.

    Of a squared loss of one output, whose curvature is 2/n: vᵀWv / (n/4) for a unit v.
    """
    recording = load_recording(folder)
    v = recording.directions[direction].reshape(-1).double()
    return [float(v @ e.gramian @ v / v.square().sum()) * 4 / len(v) for e in cumulative(recording)]


def stable_rate(x: Tensor) -> float:
    """Nine tenths of the largest stable learning rate of least squares on x [n, d]: its curvature is 2λ/n."""
    return 0.9 * len(x) / float(torch.linalg.matrix_norm(x.double(), 2)) ** 2


def with_legends(figure: Figure) -> Figure:
    for axis in figure.axes:
        if axis.get_legend_handles_labels()[0]:
            axis.grid(alpha=0.25)
            axis.legend(frameon=False, fontsize=9)
    return figure
