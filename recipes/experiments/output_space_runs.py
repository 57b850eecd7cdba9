"""The runs of ``output_space.py``: small networks on all of their data at once, and preference pairs."""

from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_poprisk.output_space import DPOMargin, OutputSpaceCallback, Recording, SquaredError, load_recording
from hf_poprisk.output_space.analysis import Analysis

OUTPUTS = Path("outputs/output_space")
QUIET = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "use_cpu": True}
QUIET |= {"disable_tqdm": True}


class Regressor(nn.Module):
    """Any network, with the loss of transformers' regression heads."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body.double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"loss": F.mse_loss(logits, labels.reshape(logits.shape)), "logits": logits}


def train(
    name: str,
    body: nn.Module,
    data: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    directions: dict[str, Tensor],
    rate: float,
    steps: int,
    records: int = 25,
    **settings: Any,
) -> tuple[Recording, Analysis]:
    """Full-batch training on inputs and labels, recorded at steps that are evenly spaced in log time."""
    rows, others = ([{"x": x, "labels": y} for x, y in zip(*part, strict=True)] for part in (data, test))
    # one batch of all: such small networks spend their time between operations
    probe, held_out = ([torch.utils.data.default_collate(part)] for part in (rows, others))
    when = {0, *(round(steps ** (i / (records - 1))) for i in range(records - 1))}
    args = TrainingArguments(
        output_dir=str(OUTPUTS / name),
        learning_rate=rate,
        max_steps=steps,
        per_device_train_batch_size=len(rows),
        lr_scheduler_type="constant",
        **{"optim": "sgd", "max_grad_norm": 0.0, **QUIET, **settings},
    )
    callback = OutputSpaceCallback(SquaredError(), probe, held_out, when, 256, directions)
    trainer = Trainer(Regressor(body), args, train_dataset=rows, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    recording = load_recording(OUTPUTS / name)
    return recording, Analysis(recording)


def seen_at_test(found: Analysis, direction: Tensor, than: Tensor) -> list[float]:
    """How much a unit of one direction moves test outputs, against a unit of another, from record two on."""
    one, other = (v.double() / v.norm() for v in (direction, than))
    return [float((e.transfer @ one).norm() / (e.transfer @ other).norm()) for e in found.evolutions[1:]]


def gone(found: Analysis, direction: Tensor) -> list[float]:
    """At each record, the share of the squared error along a direction that training has dissipated.

    Of a squared loss of one output, whose curvature is 2/n: vᵀWv / (n/4) for a unit v.
    """
    v = direction.double() / direction.double().norm()
    return [float(v @ whole.gramian @ v) * 4 / len(v) for whole in found.evolutions]


def stable_rate(x: Tensor) -> float:
    """Nine tenths of the largest stable learning rate of least squares on x [n, d]: its curvature is 2λ/n."""
    return 0.9 * len(x) / float(torch.linalg.matrix_norm(x.double(), 2)) ** 2


def train_pairs(gate: str) -> tuple[Recording, Tensor]:
    """12 steps of all of 96 training pairs; the recording, and which of them are flipped, [n] bool."""
    from trl import ScriptArguments

    from hf_poprisk import PopRiskDPOConfig, PopRiskDPOTrainer

    data = common.load_splits(ScriptArguments(dataset_name="outputs/tiny/preferences"))
    pairs = common.flip_preferences(data["train"].select(range(96)), 0.3, 0)
    flipped = torch.tensor(pairs["is_flipped"])
    settings = {"learning_rate": 3e-4, "weight_decay": 0.0, "max_steps": 12, "max_length": 160}
    settings |= {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 6, "bf16": False}
    settings |= {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
    settings |= {"model_init_kwargs": {"dtype": "float32"}, "poprisk_gate": gate, **QUIET}
    args = PopRiskDPOConfig(str(OUTPUTS / f"dpo-{gate}"), **settings)
    held_out = data["test"].select(range(48))
    trainer = PopRiskDPOTrainer("outputs/tiny/model", args=args, train_dataset=pairs, eval_dataset=held_out)
    trainer.remove_callback(PrinterCallback)
    parts = trainer.train_dataset, trainer.eval_dataset
    probe, test = ([trainer.data_collator([row]) for row in part] for part in parts)
    noise = -flipped.float()  # softplus(−u) was to be softplus(u): its gradient is off by −1
    steps = [1, 2, 4, 6, 9]  # often at first, where Adam's preconditioner changes fastest
    callback = OutputSpaceCallback(DPOMargin(args.beta), probe, test, steps, 96, {"label noise": noise})
    trainer.add_callback(callback)
    trainer.train()
    return load_recording(args.output_dir), flipped
