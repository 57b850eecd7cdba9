"""The trainers of TRL's stable part that learn from data at hand, with the gate, and their configs."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.trainer_utils import has_length
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer import utils as trl_utils

from hf_poprisk.arguments import PopRiskArgumentsMixin
from hf_poprisk.leave_one_out.features import pair_log_odds, reward_log_odds
from hf_poprisk.per_example import Capture
from hf_poprisk.per_example.fused_head import head_by_example
from hf_poprisk.refusals import EXAMPLES, LABEL_MODE, LABELS, WEIGHS, WEIGHTS, Rule, always, hiding
from hf_poprisk.trainer import PopRiskMixin, takes_what

TAG = "poprisk"
# These DPO losses sort across the batch, so no pair has a gradient of its own.
_COUPLED_LOSSES = ("aot", "aot_unpaired")


def _coupled(args: Any) -> str | None:
    return next((name for name in args.loss_type if name in _COUPLED_LOSSES), None)


@dataclass
class PopRiskDPOConfig(PopRiskArgumentsMixin, DPOConfig):
    """``trl.DPOConfig`` with the gate's fields; one example is one preference pair."""

    _example_rules = (
        *EXAMPLES,
        Rule(
            lambda a: a.poprisk_estimator == "example" and _coupled(a),
            "loss_type={found} compares the pairs of a batch with each other, so a pair has no gradient of "
            "its own: use another loss_type, such as sigmoid, or poprisk_estimator=group.",
        ),
        Rule(
            lambda a: (
                a.padding_free and a.poprisk_estimator == "example" and a.per_device_train_batch_size > 1
            ),
            "padding_free=True joins the examples of a micro-batch into one row, which hides the single "
            "ones: set padding_free=False or per_device_train_batch_size=1.",
        ),
    )
    _weight_rules = (
        *WEIGHTS,
        Rule(
            _coupled,
            "loss_type={found} compares the pairs of a batch with each other, so a pair has no loss to be "
            "weighted: use another loss_type, such as sigmoid, or remove poprisk_weight_column.",
        ),
        *hiding(WEIGHS, "padding_free"),
    )
    _label_rules = (
        *LABELS,
        Rule(
            lambda a: a.poprisk_label_noise == "weight" and _coupled(a),
            f"{LABEL_MODE} weights single pairs, and loss_type={{found}} compares those of a batch with each "
            "other: use another loss_type, such as sigmoid, or set poprisk_label_noise=audit.",
        ),
    )


@dataclass
class PopRiskSFTConfig(PopRiskArgumentsMixin, SFTConfig):
    """``trl.SFTConfig`` with the gate's fields; one example is one sequence."""

    _example_rules = (
        *EXAMPLES,
        Rule(
            lambda a: a.packing and a.packing_strategy != "bfd" and a.poprisk_estimator == "example",
            "packing_strategy={a.packing_strategy} cuts sequences, and the parts of one are no examples of "
            "their own: set packing_strategy=bfd, or poprisk_estimator=group to gate on packed rows.",
        ),
    )
    _weight_rules = (*WEIGHTS, *hiding(WEIGHS, "packing", "padding_free"))
    _label_rules = (
        Rule(
            always,
            f"{LABEL_MODE} judges labels, and a sequence has none: set poprisk_label_noise=off, or train "
            "with DPO, a reward model or a classifier.",
        ),
    )


@dataclass
class PopRiskRewardConfig(PopRiskArgumentsMixin, RewardConfig):
    """``trl.RewardConfig`` with the gate's fields; one example is one preference pair."""


@dataclass
class PopRiskKTOConfig(PopRiskArgumentsMixin, KTOConfig):
    """``trl.KTOConfig`` with the gate's fields; one example is one completion.

    The mean log-ratio of the mismatched completions, z0 in KTO's paper, is of all examples of a micro-batch.
    It has no gradient, so each example still has one of its own.
    """

    _label_rules = (
        Rule(
            always,
            f"{LABEL_MODE} judges pairs and classes, and a completion that is good or bad by itself is "
            "neither: set poprisk_label_noise=off, or train on pairs with DPO.",
        ),
    )


class FusedHeadMixin(PopRiskMixin):
    """Runs TRL's fused language-model head example by example, so that its weight can be gated."""

    def _fused_operations(self, capture: Capture) -> AbstractContextManager[None]:
        return head_by_example(capture, self.accelerator.unwrap_model(self.model), trl_utils)


class PopRiskDPOTrainer(FusedHeadMixin, DPOTrainer):
    """``trl.DPOTrainer`` with the gate."""

    rows_per_example = 2  # chosen rows first, then rejected ones
    label_log_odds = staticmethod(pair_log_odds)
    _config_class = PopRiskDPOConfig
    _tag_names = [*DPOTrainer._tag_names, TAG]
    __init__ = takes_what(DPOTrainer.__init__)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in TRL, which takes a model that has made no step for its own reference.

        Raises:
            ValueError: other data, whose reference log-probabilities are gone since a leap.
        """
        leapt = self._label_noise is not None and self._label_noise.leapt
        other = eval_dataset is not None and not isinstance(eval_dataset, str)
        if leapt and other and self.precompute_ref_logps and self.ref_model is None:
            raise ValueError(
                "poprisk_leap has moved the model that is its own reference: give this data set as "
                "eval_dataset when the trainer is built, or set precompute_ref_log_probs=False."
            )
        return super().evaluate(eval_dataset, *args, **kwargs)


class PopRiskSFTTrainer(FusedHeadMixin, SFTTrainer):
    """``trl.SFTTrainer`` with the gate."""

    _config_class = PopRiskSFTConfig
    _tag_names = [*SFTTrainer._tag_names, TAG]
    __init__ = takes_what(SFTTrainer.__init__)


class PopRiskRewardTrainer(PopRiskMixin, RewardTrainer):
    """``trl.RewardTrainer`` with the gate."""

    rows_per_example = 2  # chosen rows first, then rejected ones
    label_log_odds = staticmethod(reward_log_odds)
    _config_class = PopRiskRewardConfig
    _tag_names = [*RewardTrainer._tag_names, TAG]
    __init__ = takes_what(RewardTrainer.__init__)


class PopRiskKTOTrainer(FusedHeadMixin, KTOTrainer):
    """``trl.KTOTrainer`` with the gate."""

    _config_class = PopRiskKTOConfig
    _tag_names = [*KTOTrainer._tag_names, TAG]
    __init__ = takes_what(KTOTrainer.__init__)

    def _check_data(self, data: Any) -> None:
        """Of a stream, every micro-batch."""
        if has_length(data) and "label" in (getattr(data, "column_names", None) or ()):
            _check_labels(data["label"])

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if not has_length(self.train_dataset):
            _check_labels(inputs["label"].tolist())
        return super().training_step(model, inputs, num_items_in_batch)


def _check_labels(labels: Iterable[Any]) -> None:
    """TRL takes whatever is not zero for good: -1, 5, nan."""
    for row, label in enumerate(labels):
        if type(label) not in (bool, int) or label not in (0, 1):
            raise ValueError(
                f"the column label holds {label!r} (row {row}): KTO wants true or 1 for good completions and "
                "false or 0 for bad ones."
            )
