"""The TRL trainers with the gate, and their configs. The only module that imports trl."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils

from hf_poprisk.arguments import PopRiskArgumentsMixin
from hf_poprisk.leave_one_out.features import pair_log_odds, reward_log_odds
from hf_poprisk.per_example import Capture
from hf_poprisk.per_example.fused_head import head_by_example
from hf_poprisk.refusals import EXAMPLES, LABEL_MODE, LABELS, WEIGHTS, Rule, joins
from hf_poprisk.trainer import PopRiskMixin, takes_what

_TAG = "poprisk"
# These DPO losses sort across the batch, so no pair has a gradient of its own.
_COUPLED_LOSSES = ("aot", "aot_unpaired")


@dataclass
class PopRiskDPOConfig(PopRiskArgumentsMixin, DPOConfig):
    """``trl.DPOConfig`` with the gate's fields; one example is one preference pair."""

    _example_rules = (
        *EXAMPLES,
        Rule(
            "loss_type={found}",
            lambda a: (
                a.poprisk_estimator == "example"
                and next((name for name in a.loss_type if name in _COUPLED_LOSSES), None)
            ),
            "compares the pairs of a batch with each other, so a pair has no gradient of its own",
            "use another loss_type, such as sigmoid, or poprisk_estimator=group",
        ),
        Rule(
            "padding_free=True",
            lambda a: (
                a.padding_free and a.poprisk_estimator == "example" and a.per_device_train_batch_size > 1
            ),
            "joins the examples of a micro-batch into one row, which hides the single ones",
            "set padding_free=False or per_device_train_batch_size=1",
        ),
    )
    _weight_rules = (
        *WEIGHTS,
        Rule(
            "loss_type={found}",
            lambda a: next((name for name in a.loss_type if name in _COUPLED_LOSSES), None),
            "compares the pairs of a batch with each other, so a pair has no loss to be weighted",
            "use another loss_type, such as sigmoid, or remove poprisk_weight_column",
        ),
        joins("padding_free=True", lambda a: a.padding_free, "set padding_free=False"),
    )
    _label_rules = (
        *LABELS,
        Rule(
            LABEL_MODE,
            lambda a: (
                a.poprisk_label_noise == "weight"
                and next((name for name in a.loss_type if name in _COUPLED_LOSSES), None)
            ),
            "weights single pairs, and loss_type={found} compares those of a batch with each other",
            "use another loss_type, such as sigmoid, or set poprisk_label_noise=audit",
        ),
    )


@dataclass
class PopRiskSFTConfig(PopRiskArgumentsMixin, SFTConfig):
    """``trl.SFTConfig`` with the gate's fields; one example is one sequence."""

    _example_rules = (
        *EXAMPLES,
        Rule(
            "packing_strategy={a.packing_strategy}",
            lambda a: a.packing and a.packing_strategy != "bfd" and a.poprisk_estimator == "example",
            "cuts sequences, and the parts of one are no examples of their own",
            "set packing_strategy=bfd, or poprisk_estimator=group to gate on packed rows",
        ),
    )
    _weight_rules = (
        *WEIGHTS,
        joins("packing=True", lambda a: a.packing, "set packing=False"),
        joins("padding_free=True", lambda a: a.padding_free, "set padding_free=False"),
    )
    _label_rules = (
        Rule(
            LABEL_MODE,
            lambda a: True,
            "judges labels, and a sequence has none",
            "set poprisk_label_noise=off, or train with DPO, a reward model or a classifier",
        ),
    )


@dataclass
class PopRiskRewardConfig(PopRiskArgumentsMixin, RewardConfig):
    """``trl.RewardConfig`` with the gate's fields; one example is one preference pair."""


class _FusedHeadMixin(PopRiskMixin):
    """Runs TRL's fused language-model head example by example, so that its weight can be gated."""

    def _fused_operations(self, capture: Capture) -> AbstractContextManager[None]:
        return head_by_example(capture, self.accelerator.unwrap_model(self.model), trl_utils)


class PopRiskDPOTrainer(_FusedHeadMixin, DPOTrainer):
    """``trl.DPOTrainer`` with the gate."""

    rows_per_example = 2  # chosen rows first, then rejected ones
    label_log_odds = staticmethod(pair_log_odds)
    _config_class = PopRiskDPOConfig
    _tag_names = [*DPOTrainer._tag_names, _TAG]

    @takes_what(DPOTrainer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class PopRiskSFTTrainer(_FusedHeadMixin, SFTTrainer):
    """``trl.SFTTrainer`` with the gate."""

    _config_class = PopRiskSFTConfig
    _tag_names = [*SFTTrainer._tag_names, _TAG]

    @takes_what(SFTTrainer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class PopRiskRewardTrainer(PopRiskMixin, RewardTrainer):
    """``trl.RewardTrainer`` with the gate."""

    rows_per_example = 2  # chosen rows first, then rejected ones
    label_log_odds = staticmethod(reward_log_odds)
    _config_class = PopRiskRewardConfig
    _tag_names = [*RewardTrainer._tag_names, _TAG]

    @takes_what(RewardTrainer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
