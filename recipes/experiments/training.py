"""The training that the small experiments share, and the control that every gate must beat."""

import tempfile
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import RecipeError
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, set_seed

from hf_poprisk import PopRiskAdamW, PopRiskTrainer, PopRiskTrainingArguments
from hf_poprisk.eigen import EigenPopRiskAdamW

GATES = {  # the arms of the small experiments
    "adamw": {"poprisk_gate": "none"},
    "adamw-early": {"poprisk_gate": "none", "early": True},
    "hard": {"poprisk_gate": "hard"},
    "soft": {"poprisk_gate": "soft"},
    "ema-soft": {"poprisk_gate": "soft", "poprisk_estimator": "ema"},
    "random-mask": {"poprisk_gate": "hard", "random_mask": True},
    "random-mask-soft": {"poprisk_gate": "soft", "random_mask": True},
}


class RandomMaskAdamW(PopRiskAdamW):
    """Control: writes a random part of what was touched, as large as the gate's, tensor by tensor."""

    def decide(self, grad: Tensor, sq_sum: Tensor, num_examples: int) -> Tensor:
        if not hasattr(self, "_masks"):  # a source of its own: the order of the examples must not change
            self._masks = torch.Generator(sq_sum.device).manual_seed(torch.initial_seed())
        touched = sq_sum > 0
        sums = super().decide(grad, sq_sum, num_examples)
        opened, live = sums[:2].tolist()
        sq_sum.bernoulli_(min(opened / max(live, 1.0), 1.0), generator=self._masks).mul_(touched)
        return sums


class RandomMaskEigenAdamW(RandomMaskAdamW, EigenPopRiskAdamW):
    """The same in the eigenbasis."""


def masked(base: type[PopRiskTrainer]) -> type[PopRiskTrainer]:
    """A trainer with the control in the place of its optimizer."""

    class Masked(base):
        @staticmethod
        def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
            kind = RandomMaskEigenAdamW if args.poprisk_basis == "eigen" else RandomMaskAdamW
            return kind, base.get_optimizer_cls_and_kwargs(args, model)[1]

    return Masked


class Classifier(nn.Module):
    """Cross-entropy of the ``logits``, by default those of ``layers``."""

    def logits(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.logits(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset):
    """Tensors with one row per example, handed out a batch at a time."""

    def __init__(self, **columns: Tensor) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, row: int) -> dict[str, Tensor]:  # where labels are judged, rows are numbered
        return {name: column[row] for name, column in self._columns.items()}

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return {name: column[rows] for name, column in self._columns.items()}


def collate(batch: dict[str, Tensor] | list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return batch if isinstance(batch, dict) else torch.utils.data.default_collate(batch)


class Watch(TrainerCallback):
    """Calls ``measure(step)`` every so many steps; ends the training where that returns None."""

    def __init__(self, measure: Callable[[int], dict[str, float] | None], every: int) -> None:
        self._measure, self._every = measure, every
        self.curves: dict[str, list[float]] = defaultdict(list)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            measured = self._measure(state.global_step)
            if measured is None:
                control.should_training_stop = True
                return
            for name, value in {"step": state.global_step, **measured}.items():
                self.curves[name].append(value)


def fit(
    model: nn.Module, data: Rows, options: dict[str, Any], measure: Callable[[int], dict[str, float] | None]
) -> dict[str, list[float]]:
    """Train with ``PopRiskTrainer``.

    Args:
        options: of a cell; ``seed``, ``steps``, ``every`` (steps between two measurements; the last step is
            one of them), ``examples_per_step``, and whatever else is a training argument. ``random_mask``
            puts the control in the place of the gate.
        measure: step → what is to be recorded then, or None to stop. With ``held``, an error on noisy data
            that are not trained on, the curves end where it is lowest.

    Returns:
        The recorded curves, ``step`` among them.
    """
    steps, every, batch = (options[name] for name in ("steps", "every", "examples_per_step"))
    if len(data) < batch:
        raise RecipeError(f"examples_per_step={batch} of {len(data)} examples.")
    if steps % every:
        raise RecipeError(f"steps={steps} must be a multiple of every={every}.")
    exact = options.get("poprisk_gate") != "none" and options.get("poprisk_estimator", "example") == "example"
    if options.get("random_mask") and not exact:
        raise RecipeError("random_mask takes the place of a gate: it needs one that is exact.")
    names = {field for field in PopRiskTrainingArguments.__dataclass_fields__ if field in options}
    trainer_class = masked(PopRiskTrainer) if options.get("random_mask") else PopRiskTrainer
    watch = Watch(measure, every)
    set_seed(options["seed"])
    with tempfile.TemporaryDirectory() as folder:
        defaults = {"lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0}
        args = PopRiskTrainingArguments(
            **(defaults | {name: options[name] for name in names}),
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            use_cpu=True,
            disable_tqdm=True,
            dataloader_drop_last=True,
            remove_unused_columns=False,  # the batches are ready
            **dict.fromkeys(("logging_strategy", "eval_strategy", "save_strategy"), "no"),
            report_to="none",
        )
        trainer = trainer_class(model, args, data_collator=collate, train_dataset=data, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    curves = dict(watch.curves)
    if not np.isfinite(curves.get("held", np.nan)).any():
        return curves
    stop = int(np.nanargmin(curves["held"])) + 1
    return {name: values[:stop] for name, values in curves.items()}
