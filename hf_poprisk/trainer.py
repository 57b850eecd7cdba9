"""PopRiskMixin: a stock trainer whose every micro-step is one leave-one-out unit."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from hf_poprisk.arguments import OPTIM, PopRiskTrainingArguments
from hf_poprisk.optimizer import PopRiskAdamW, matching

logger = logging.getLogger(__name__)


class PopRiskMixin:
    """Stands before a ``Trainer`` class in the bases and gates its optimizer.

    ``optim="poprisk_adamw"`` in the arguments turns it on; with any other optimizer the trainer is the
    stock one. Logs ``poprisk/fraction_open``, ``poprisk/fraction_open_null``, ``poprisk/examples`` (or
    ``groups``) and ``poprisk/margin``.

    Raises (on construction with a training set, and in ``train``):
        TypeError: ``args`` of a stock class.
        ValueError: a setting that the gate cannot serve; see ``PopRiskArgumentsMixin.check_training``.
    """

    _config_class: type[Any] = PopRiskTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Bound by name, because DPO has `ref_model` where the others have `args`.
        call = inspect.signature(super().__init__).bind(*args, **kwargs)
        config = call.arguments.get("args")
        if config is None:  # the stock trainers would make a config of their own, without the gate
            config = call.arguments["args"] = self._config_class()
        if not isinstance(config, self._config_class):
            raise TypeError(
                f"{type(self).__name__} takes a {self._config_class.__name__}, got "
                f"{type(config).__name__}: the stock class has no gate."
            )
        if call.arguments.get("train_dataset") is not None:
            config.check_training()
        super().__init__(*call.args, **call.kwargs)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """As in transformers; knows ``poprisk_adamw``."""
        if args.optim != OPTIM:
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        named = list(model.named_parameters()) if model is not None else []
        return PopRiskAdamW, {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "ungated": matching(named, args.poprisk_exclude or ()),
            **args.gate_options(),
        }

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        super().create_optimizer(model)  # type: ignore[misc]
        optimizer = self._poprisk_optimizer()
        if optimizer is None and self.args.optim == OPTIM:
            raise ValueError(
                f"optim={OPTIM}, but the optimizer handed to the trainer is {type(self.optimizer).__name__}: "
                "pass a PopRiskAdamW, or set optim=adamw_torch for a run without the gate."
            )
        if optimizer is not None:
            named = dict((self.model if model is None else model).named_parameters())
            _check_agreement(optimizer, named, self.args)
            optimizer.name_parameters(named.items())
            if self.is_world_process_zero():
                # A warning, because the default verbosity hides anything less and a run must say it.
                logger.warning(_summary(optimizer, named, self.args))
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.args.check_training()
        if self.args.optim == OPTIM and self.args.poprisk_gate != "none":
            self._check_launch()
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _check_launch(self) -> None:
        """What only the built trainer knows: how it was launched, and how much data there is."""
        for name, on in (("FSDP", self.is_fsdp_enabled), ("DeepSpeed", self.is_deepspeed_enabled)):
            if on:
                raise ValueError(
                    f"{name} is not supported by optim={OPTIM}: launch with DDP, or set poprisk_gate=none."
                )
        world, per_step = (
            self.args.world_size,
            self.args.units_per_step * self.args.per_device_train_batch_size,
        )
        size = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else per_step
        drop_last = self.args.dataloader_drop_last
        if (
            world > 1
            and size < per_step
            and size % (world * self.args.per_device_train_batch_size)
            and not drop_last
        ):
            raise ValueError(
                f"{size} training examples do not divide over {world} processes, and the copies that fill "
                "the gap would stand beside their originals in one step, where the gate takes them for "
                f"evidence: set dataloader_drop_last=True or train on a multiple of {world}."
            )

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-step is one example; the last of a window decides the gate.

        Here the gradients are reduced over the ranks, and neither unscaled nor clipped.
        """
        optimizer = self._poprisk_optimizer()
        if optimizer is None:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        with optimizer.example():
            loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if self.accelerator.sync_gradients:
            optimizer.close_window()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        optimizer = self._poprisk_optimizer()
        if optimizer is not None and "loss" in logs:
            unit = "groups" if self.args.poprisk_estimator == "group" else "examples"
            logs = {**logs, **optimizer.statistics.pop(unit)}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _poprisk_optimizer(self) -> PopRiskAdamW | None:
        optimizer = self.optimizer
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        return optimizer if isinstance(optimizer, PopRiskAdamW) else None


def _check_agreement(optimizer: PopRiskAdamW, named: dict[str, torch.Tensor], args: Any) -> None:
    """Refuse a hand-made PopRiskAdamW that is not what the arguments say: the checks rely on them."""
    if args.optim != OPTIM:
        name = getattr(args.optim, "value", args.optim)
        raise ValueError(f"a PopRiskAdamW was handed to the trainer, but optim={name}: set optim={OPTIM}.")
    for name, value in args.gate_options().items():
        if getattr(optimizer, name) != value:
            raise ValueError(
                f"the PopRiskAdamW handed to the trainer has {name}={getattr(optimizer, name)!r}, but "
                f"poprisk_{name}={value!r}: give both the same value."
            )
    excluded = set(matching(named.items(), args.poprisk_exclude or ()))
    wanted = {p for p in named.values() if p.requires_grad} - excluded
    if optimizer.gate != "none" and set(optimizer.gated_parameters) != wanted:
        raise ValueError(
            "the PopRiskAdamW handed to the trainer gates other parameters than poprisk_exclude leaves: "
            "give both the same ones."
        )


def _summary(optimizer: PopRiskAdamW, named: dict[str, torch.Tensor], args: Any) -> str:
    """One line that says what is gated and what is not, adapter parts counted by kind."""
    if optimizer.gate == "none":
        return "population-risk gate: off (gate=none), plain AdamW."
    gated = set(optimizer.gated_parameters)
    kinds = Counter(_kind(name) for name, p in named.items() if p in gated)
    open_ = sum(p.requires_grad and p not in gated for p in named.values())
    unit = (
        ""
        if optimizer.estimator == "ema"
        else (
            f", {args.units_per_step} {'groups' if optimizer.estimator == 'group' else 'examples'} per step "
            f"({args.world_size} process(es) × {args.gradient_accumulation_steps} backwards)"
        )
    )
    return (
        f"population-risk gate: {optimizer.gate}, estimator={optimizer.estimator}, "
        f"reduction={optimizer.reduction}{unit}; gated {sum(p.numel() for p in gated):,} parameters in "
        f"{len(gated)} tensors ({', '.join(f'{kind} {n}' for kind, n in sorted(kinds.items()))}), "
        f"{open_} trainable tensors ungated."
    )


def _kind(name: str) -> str:
    """``lora_A``, ``lora_magnitude_vector``, ``modules_to_save`` …, or ``model``."""
    parts = name.split(".")
    adapter = (part for part in parts if part.startswith("lora_") or part == "modules_to_save")
    return next(adapter, "model")


class PopRiskTrainer(PopRiskMixin, Trainer):
    """``transformers.Trainer`` with the gate."""
