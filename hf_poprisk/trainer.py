"""PopRiskMixin: a stock trainer that shows its optimizer every example of a step."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import has_length

from hf_poprisk.any_optimizer import PopRiskGate
from hf_poprisk.arguments import OPTIM, PopRiskArgumentsMixin, PopRiskTrainingArguments
from hf_poprisk.checkpoints import CheckpointMixin
from hf_poprisk.eigen import MeasureBases
from hf_poprisk.hub import HubMixin
from hf_poprisk.leave_one_out.index import take_sample, with_index
from hf_poprisk.leave_one_out.mixin import LabelNoiseMixin
from hf_poprisk.microbatch import MicrobatchMixin
from hf_poprisk.optimizer import GatedOptimizer, PopRiskAdamW
from hf_poprisk.options import matching
from hf_poprisk.per_example.fsdp2 import is_sharded
from hf_poprisk.record import describe_data
from hf_poprisk.risk import RiskMeter, no_moments
from hf_poprisk.sample_weights import SampleWeightMixin, take_weights
from hf_poprisk.sharding import ShardingMixin
from hf_poprisk.user_errors import need

logger = logging.getLogger(__name__)
_P = ParamSpec("_P")


def takes_what(stock: Callable[_P, None]) -> Callable[_P, None]:
    """``PopRiskMixin.__init__`` with the stock parameters, for editors, type checkers and ``help``."""

    @wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        PopRiskMixin.__init__(self, *args, **kwargs)

    return init  # type: ignore[return-value]  # which takes anything


class PopRiskMixin(
    MicrobatchMixin, ShardingMixin, HubMixin, CheckpointMixin, SampleWeightMixin, LabelNoiseMixin
):
    """Stands before a ``Trainer`` class in the bases and gates its optimizer.

    ``optim="poprisk_adamw"`` in the arguments turns it on. With any other optimizer the trainer is the stock
    one, unless ``poprisk_gate`` is given: then the gate is put around it. It logs ``poprisk/…``: see README.

    Raises (on construction with a training set, and in ``train``):
        TypeError: ``args`` of a stock class, or of one that is made for another trainer.
        ValueError: a setting that the gate cannot serve; see ``PopRiskArgumentsMixin.check_training``.
    """

    # Of the trainers with a config of their own; TRL would make its stock config of another class.
    _config_class: type[Any] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Bound by name, because DPO has `ref_model` where the others have `args`.
        call = inspect.signature(super().__init__).bind(*args, **kwargs)
        config = call.arguments.get("args")
        if config is None:  # the stock trainers would make a config of their own, without the gate
            config = call.arguments["args"] = (self._config_class or PopRiskTrainingArguments)()
        if not isinstance(config, self._config_class or PopRiskArgumentsMixin):
            name = type(config).__name__
            way_out = f"put PopRiskArgumentsMixin before {name} in a dataclass of your own"
            if self._config_class is not None:
                way_out = f"use {self._config_class.__name__}"
            raise TypeError(f"{type(self).__name__} does not take {name}: {way_out}.")
        data, weights = call.arguments.get("train_dataset"), None
        judged = data is not None and config.poprisk_label_noise != "off"
        if data is not None:
            config.check_training()
            if has_length(data) and len(data) == 0:
                raise ValueError("train_dataset is empty: give it at least one example.")
            if config.poprisk_basis == "eigen" and not has_length(data):
                raise ValueError(
                    "poprisk_basis=eigen is measured on examples from all over the training set, which a "
                    "stream does not have: train on a data set that is none, or set poprisk_basis=coordinate."
                )
            self._check_data(data)
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
        super().__init__(*call.args, **call.kwargs)
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
        if config.poprisk_basis == "eigen":  # after the callback that judges, and may leap
            self.add_callback(MeasureBases(self))

    def _check_data(self, data: Any) -> None:
        """For trainers that know what a column must hold; before anything is loaded."""

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
        named = dict((self.model if model is None else model).named_parameters())
        if self.args.optim != OPTIM and self.args.gated and self._poprisk_optimizer() is None:
            self.optimizer = PopRiskGate(
                self.optimizer,
                gate=self.args.poprisk_gate,
                estimator=self.args.poprisk_estimator,
                ungated=matching(named.items(), self.args.poprisk_exclude or ()),
            )
        optimizer = self._poprisk_optimizer()
        if optimizer is None and self.args.optim == OPTIM:
            raise ValueError(
                f"optim={OPTIM}, but the optimizer handed to the trainer is {type(self.optimizer).__name__}: "
                "pass a PopRiskAdamW or a PopRiskGate, or set optim=adamw_torch for a run without the gate."
            )
        if self._risk is not None and not isinstance(_unwrap(self.optimizer), torch.optim.Adam):
            raise no_moments(self.optimizer)
        if self._risk is not None and optimizer is not None:
            optimizer.keep_written = True
        if isinstance(optimizer, PopRiskGate) and optimizer.gate != "none":
            self._check_launch("PopRiskGate", "poprisk_gate=none")
        if optimizer is not None:
            _check_agreement(optimizer, named, self.args)
            optimizer.name_parameters(named.items())
            if self.is_world_process_zero():
                # A warning, because the default verbosity hides anything less and a run must say it.
                logger.warning(_summary(optimizer, self.args))
            if self.accelerator.is_fsdp2 and not is_sharded(self.model):
                self._let_go(optimizer)  # type: ignore[arg-type]
            else:
                self._prepare_layers(optimizer)  # type: ignore[arg-type]  # any gated one
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.args.check_training()
        if self.args.poprisk_label_noise != "off" and self._label_noise is None:
            raise ValueError(
                "poprisk_label_noise was set without a training set: give train_dataset when the trainer is "
                "built."
            )
        gated, by, without = self.args.gated, self.args.gated_by, self.args.plain_options
        if self._label_noise is not None or self.args.poprisk_basis == "eigen":
            self._check_launch(by, without)
        elif gated:
            self._check_sharding(by, without)
        if gated:
            self._check_copies()
        if self._risk is not None:
            self._check_launch("poprisk_risk=true", "poprisk_risk=false")
        self._check_weights()
        if self.args.optim != OPTIM and not gated and self.is_world_process_zero():
            name = self.args.optim.value
            logger.warning(
                f"optim={name}: plain {name}, no population-risk gate; set optim={OPTIM} for it, or "
                f"poprisk_gate=hard for one around {name}."
            )
        nothing = "no step was made: the stream ended before one was full, so check what it gives."
        try:
            result = super().train(*args, **kwargs)  # type: ignore[misc]
        except ValueError as error:
            if "Batch does not contain any data" in str(error):  # accelerate's, of the first one
                raise ValueError(nothing) from error
            raise
        if self.state.global_step == 0 and not has_length(self.train_dataset):
            raise ValueError(nothing)
        return result

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """As in transformers, which takes no step where there is no batch, and says nothing."""
        if has_length(dataloader) and not len(dataloader):
            names = ("per_device_train_batch_size", "generation_batch_size", "dataloader_drop_last")
            asked = ", ".join(f"{n}={getattr(args, n)}" for n in names if hasattr(args, n))
            raise ValueError(
                f"no step would be made: {len(self.train_dataset)} examples do not fill a batch ({asked}), "
                "so lower these, or train on more."
            )
        return super().set_initial_training_values(args, dataloader)  # type: ignore[misc]

    def end(self) -> None:
        super().end()  # type: ignore[misc]
        # gloo's threads let go of their last tensors meanwhile; if DDP drops the group before that, both wait
        # for good (pytorch/pytorch#56297)
        time.sleep(0.1)

    def _check_copies(self) -> None:
        """Padding copies beside their originals in one step."""
        world, micro_batch = self.args.world_size, self.args.per_device_train_batch_size
        together = world * micro_batch
        if world == 1 or self.args.dataloader_drop_last or not has_length(self.train_dataset):
            return
        size = len(self.train_dataset)
        if not self.args.accelerator_config.even_batches:  # no copies, and perhaps ranks with nothing
            if 0 < size % together <= together - micro_batch:
                raise ValueError(
                    f"{size} training examples do not divide over {world} processes × {micro_batch}, "
                    "and the processes with one more batch would wait for the others for ever: set "
                    "even_batches=true in accelerator_config, or dataloader_drop_last=True."
                )
        elif size < together * self.args.gradient_accumulation_steps and size % together:
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
            self._risk.observe(_unwrap(self.optimizer), self._loss_scale, self.args.max_grad_norm)
        return loss

    @property
    def _loss_scale(self) -> float:
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else scaler.get_scale()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs, optimizer = {**logs}, self._poprisk_optimizer()
            if optimizer is not None:
                logs |= optimizer.statistics.pop(_units(self.args))
            if self._risk is not None:
                logs |= self._risk.pop(self.state.log_history)
            if self._label_noise is not None:
                logs |= self._label_noise.logs()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _poprisk_optimizer(self) -> GatedOptimizer | None:
        optimizer = _unwrap(self.optimizer)
        return optimizer if isinstance(optimizer, GatedOptimizer) else None


def _unwrap(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    while not isinstance(optimizer, GatedOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _check_agreement(optimizer: GatedOptimizer, named: dict[str, torch.Tensor], args: Any) -> None:
    """Refuse a hand-made optimizer that is not what the arguments say: the checks rely on them."""
    kind = type(optimizer).__name__
    if args.optim != OPTIM and isinstance(optimizer, PopRiskAdamW):
        raise ValueError(
            f"a PopRiskAdamW was handed to the trainer, but optim={args.optim.value}: set optim={OPTIM}."
        )
    for name, value in args.gate_options().items():
        if getattr(optimizer, name) != value:
            raise ValueError(
                f"the {kind} handed to the trainer has {name}={getattr(optimizer, name)!r}, but "
                f"poprisk_{name}={value!r}: give both the same value."
            )
    excluded = set(matching(named.items(), args.poprisk_exclude or ()))
    wanted = {p for p in named.values() if p.requires_grad} - excluded
    if optimizer.gate != "none" and set(optimizer.gated_parameters) != wanted:
        raise ValueError(
            f"the {kind} handed to the trainer gates other parameters than poprisk_exclude leaves: give both "
            "the same ones."
        )


def _summary(optimizer: GatedOptimizer, args: Any) -> str:
    """One line that says what is gated and what is not."""
    inner = type(optimizer.inner).__name__ if isinstance(optimizer, PopRiskGate) else None
    if optimizer.gate == "none":
        kind = f"plain {inner or 'AdamW'}" if optimizer.basis == "coordinate" else "AdamW with basis=eigen"
        return f"population-risk gate: off (gate=none), {kind}."
    around = f" around {inner}" if inner else ""
    gated = optimizer.gated_parameters
    trainable = sum(p.requires_grad for group in optimizer.param_groups for p in group["params"])
    per_step, few, units = "", "", args.units_per_step
    if optimizer.estimator != "ema":
        layout = f"{args.world_size} process(es) × {args.gradient_accumulation_steps} backwards"
        per_backward = units // (args.world_size * args.gradient_accumulation_steps)
        if per_backward > 1:
            layout += f" × {per_backward}"
        per_step = f", {units} {_units(args)} per step ({layout})"
        if units < 4:
            few = (
                f" With {units} per step the test has little power, and noise often passes: raise "
                "gradient_accumulation_steps."
            )
    return (
        f"population-risk gate: {optimizer.gate}{around}, estimator={optimizer.estimator}{per_step}; gated "
        f"{sum(p.numel() for p in gated):,} parameters in {len(gated)} tensors, {trainable - len(gated)} "
        f"trainable tensors ungated.{few}"
    )


def _units(args: Any) -> str:
    return "groups" if args.poprisk_estimator == "group" else "examples"


class PopRiskTrainer(PopRiskMixin, Trainer):
    """``transformers.Trainer`` with the gate."""

    _config_class = PopRiskTrainingArguments
    __init__ = takes_what(Trainer.__init__)
