"""PopRiskMixin: a stock trainer that shows its optimizer every example of a step."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import has_length

from hf_poprisk.arguments import OPTIM, PopRiskArgumentsMixin, PopRiskTrainingArguments
from hf_poprisk.checkpoints import CheckpointMixin
from hf_poprisk.command import need
from hf_poprisk.hub import HubMixin
from hf_poprisk.leave_one_out.index import take_sample, with_index
from hf_poprisk.leave_one_out.mixin import LabelNoiseMixin
from hf_poprisk.microbatch import MicrobatchMixin
from hf_poprisk.optimizer import PopRiskAdamW
from hf_poprisk.options import matching
from hf_poprisk.per_example.examples import take_example as take_example
from hf_poprisk.record import describe_data
from hf_poprisk.risk import RiskMeter, no_moments
from hf_poprisk.sample_weights import SampleWeightMixin, take_weights

logger = logging.getLogger(__name__)
_P = ParamSpec("_P")


def takes_what(stock: Callable[_P, None]) -> Callable[[Callable[..., None]], Callable[_P, None]]:
    """Give an ``__init__`` that passes everything on the parameters of the stock one.

    For editors, type checkers, ``help`` and ``inspect.signature``, which would see ``*args, **kwargs``.
    """

    def decorate(init: Callable[..., None]) -> Callable[_P, None]:
        init.__signature__, init.__doc__ = inspect.signature(stock), stock.__doc__  # type: ignore[attr-defined]
        return init

    return decorate


class PopRiskMixin(MicrobatchMixin, HubMixin, CheckpointMixin, SampleWeightMixin, LabelNoiseMixin):
    """Stands before a ``Trainer`` class in the bases and gates its optimizer.

    ``optim="poprisk_adamw"`` in the arguments turns it on; with any other optimizer the trainer is the
    stock one. Logs ``poprisk/fraction_open``, ``poprisk/fraction_open_null``, ``poprisk/examples`` (or
    ``groups``) and ``poprisk/margin``.

    Raises (on construction with a training set, and in ``train``):
        TypeError: ``args`` of a stock class, or of one that is made for another trainer.
        ValueError: a setting that the gate cannot serve; see ``PopRiskArgumentsMixin.check_training``.
    """

    # Of the trainers with a config of their own; TRL would make its stock config of another class.
    _config_class: type[Any] | None = None
    _said_without_gate = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Bound by name, because DPO has `ref_model` where the others have `args`.
        call = inspect.signature(super().__init__).bind(*args, **kwargs)
        config = call.arguments.get("args")
        if config is None:  # the stock trainers would make a config of their own, without the gate
            config = call.arguments["args"] = (self._config_class or PopRiskTrainingArguments)()
        wanted: type[Any] = self._config_class or PopRiskArgumentsMixin
        if not isinstance(config, wanted):
            raise self._wrong_config(config)
        data, ids, weights = call.arguments.get("train_dataset"), None, None
        judged = data is not None and config.poprisk_label_noise != "off"
        if data is not None:
            config.check_training()
            if has_length(data) and len(data) == 0:
                raise ValueError("train_dataset is empty: give it at least one example.")
            self._check_label_weight(data, call.arguments.get("model"), config)
            if config.poprisk_weight_column is not None:
                unweighted, weights = take_weights(data, config.poprisk_weight_column)
                call.arguments["train_dataset"], ids = with_index(unweighted)
            self._training_data = describe_data(data, weights)
        if judged:
            need("datasets", "poprisk_label_noise")
            call.arguments["train_dataset"], ids = with_index(data)
            sample = take_sample(data, ids)  # before the trainer makes tokens of it
        self._risk = RiskMeter() if config.poprisk_risk else None
        try:
            super().__init__(*call.args, **call.kwargs)
        except AttributeError as error:
            if error.obj is not config:
                raise
            raise self._wrong_config(config, f" ({error.name} is missing)") from error
        left = getattr(self, "train_dataset", None)
        if data is not None and has_length(left) and len(left) == 0:  # the sampler would not say why
            raise ValueError(
                f"no training example is left of {len(data) if has_length(data) else 'the stream'}: "
                f"max_length={getattr(config, 'max_length', None)} drops them all, so raise max_length."
            )
        if judged:
            self._start_label_noise(ids, sample)
        if weights is not None:
            self._start_weights(ids, weights)

    def _check_label_weight(self, data: Any, model: Any, config: Any) -> None:
        """Refuse the weights that the audit writes where no loss reads them."""
        if "label_weight" not in (getattr(data, "column_names", None) or ()):
            return
        if config.poprisk_weight_column == "label_weight":
            return
        known = ("hf_poprisk", "transformers", "trl")
        losses = (c for c in type(self).__mro__ if "compute_loss" in vars(c))
        own_loss = any(c.__module__.partition(".")[0] not in known for c in losses)
        forward = getattr(model, "forward", None)  # the model may be a name
        if own_loss or forward and "label_weight" in inspect.signature(forward).parameters:
            return
        raise ValueError(
            f"{type(self).__name__} does not read the column label_weight: train with "
            "poprisk_weight_column=label_weight, remove it, or read it in a compute_loss of your own."
        )

    def _wrong_config(self, config: Any, why: str = "") -> TypeError:
        if self._config_class is not None:
            way_out = f"use {self._config_class.__name__}"
        elif type(config) is TrainingArguments:
            way_out = f"use {PopRiskTrainingArguments.__name__}"
        else:
            gated = isinstance(config, PopRiskArgumentsMixin)  # and made for another trainer
            stock = "the config class of the stock trainer" if gated else type(config).__name__
            way_out = f"put PopRiskArgumentsMixin before {stock} in a dataclass of your own"
        return TypeError(f"{type(self).__name__} does not take {type(config).__name__}{why}: {way_out}.")

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
        if self._risk is not None and not isinstance(_unwrap(self.optimizer), torch.optim.Adam):
            raise no_moments(self.optimizer)
        if self._risk is not None and optimizer is not None:
            optimizer.keep_written = True
        if optimizer is not None:
            named = dict((self.model if model is None else model).named_parameters())
            _check_agreement(optimizer, named, self.args)
            optimizer.name_parameters(named.items())
            if self.is_world_process_zero():
                # A warning, because the default verbosity hides anything less and a run must say it.
                logger.warning(_summary(optimizer, named, self.args))
            self._prepare_layers(optimizer)
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.args.check_training()
        if self.args.poprisk_label_noise != "off" and self._label_noise is None:
            raise ValueError(
                "poprisk_label_noise was set without a training set: give train_dataset when the trainer is "
                "built."
            )
        if self.args.optim == OPTIM and (self.args.poprisk_gate != "none" or self._label_noise is not None):
            self._check_launch(f"optim={OPTIM}", self.args.plain_options)
            self._check_copies()
        if self._risk is not None:
            self._check_launch("poprisk_risk=true", "poprisk_risk=false")
        self._check_weights()
        self._say_without_gate()
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _say_without_gate(self) -> None:
        if self.args.optim == OPTIM or self._said_without_gate or not self.is_world_process_zero():
            return
        self._said_without_gate = True
        name = getattr(self.args.optim, "value", self.args.optim)
        logger.warning(f"optim={name}: plain {name}, no population-risk gate; set optim={OPTIM} for it.")

    def _check_launch(self, what: str, without: str) -> None:
        """Sharding that the launcher switched on, which only the built trainer knows."""
        for name, on in (("FSDP", self.is_fsdp_enabled), ("DeepSpeed", self.is_deepspeed_enabled)):
            if on:
                raise ValueError(f"{name} is not supported by {what}: launch with DDP, or set {without}.")

    def _check_copies(self) -> None:
        """Padding copies beside their originals in one step."""
        if self.args.poprisk_gate == "none":
            return  # copies of an example are booked once
        world, micro_batch = self.args.world_size, self.args.per_device_train_batch_size
        per_step = self.args.gradient_accumulation_steps * world * micro_batch
        size = len(self.train_dataset) if has_length(self.train_dataset) else per_step
        drop_last = self.args.dataloader_drop_last
        together = world * micro_batch
        if world > 1 and size < per_step and size % together and not drop_last:
            raise ValueError(
                f"{size} training examples do not divide over {world} processes × {micro_batch} examples, "
                "and the copies that fill the gap would stand beside their originals in one step, where the "
                "gate takes them for evidence: set dataloader_drop_last=True or train on a multiple of "
                f"{together}."
            )

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Show the optimizer the examples of this micro-step; the last one of a window decides the gate.

        Here the gradients are reduced over the ranks, and neither unscaled nor clipped.
        """
        loss = self._gated_step(model, inputs, num_items_in_batch)
        if self._risk is not None and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            scale = 1.0 if scaler is None else scaler.get_scale()
            self._risk.observe(_unwrap(self.optimizer), scale, self.args.max_grad_norm)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        optimizer = self._poprisk_optimizer()
        if optimizer is not None and "loss" in logs:
            logs = {**logs, **optimizer.statistics.pop(_units(self.args))}
        if self._risk is not None and "loss" in logs:
            logs = {**logs, **self._risk.pop(self.state.log_history)}
        if self._label_noise is not None and "loss" in logs:
            logs = {**logs, **self._label_noise.logs()}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _poprisk_optimizer(self) -> PopRiskAdamW | None:
        optimizer = _unwrap(self.optimizer)
        return optimizer if isinstance(optimizer, PopRiskAdamW) else None


def _unwrap(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


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
    ungated = sum(p.requires_grad and p not in gated for p in named.values())
    per_step, few = "", ""
    if optimizer.estimator != "ema":
        factors = [f"{args.world_size} process(es)", f"{args.gradient_accumulation_steps} backwards"]
        if args.per_device_train_batch_size > 1:
            factors.append(str(args.per_device_train_batch_size))
        per_step = f", {args.units_per_step} {_units(args)} per step ({' × '.join(factors)})"
        if args.units_per_step < 4:
            few = (
                f" With {args.units_per_step} per step the test has little power, and noise often passes: "
                "raise gradient_accumulation_steps."
            )
    return (
        f"population-risk gate: {optimizer.gate}, estimator={optimizer.estimator}{per_step}; "
        f"gated {sum(p.numel() for p in gated):,} parameters in "
        f"{len(gated)} tensors ({', '.join(f'{kind} {n}' for kind, n in sorted(kinds.items()))}), "
        f"{ungated} trainable tensors ungated.{few}"
    )


def _units(args: Any) -> str:
    return "groups" if args.poprisk_estimator == "group" else "examples"


def _kind(name: str) -> str:
    """``lora_A``, ``lora_magnitude_vector``, ``modules_to_save`` …, or ``model``."""
    parts = name.split(".")
    adapter = (part for part in parts if part.startswith("lora_") or part == "modules_to_save")
    return next(adapter, "model")


class PopRiskTrainer(PopRiskMixin, Trainer):
    """``transformers.Trainer`` with the gate."""

    _config_class = PopRiskTrainingArguments

    @takes_what(Trainer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
