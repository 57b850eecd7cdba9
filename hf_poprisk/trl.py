"""The TRL trainers with the gate, and their configs. The only module that imports trl."""

from __future__ import annotations

from dataclasses import dataclass

from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from hf_poprisk.arguments import PopRiskArgumentsMixin
from hf_poprisk.trainer import PopRiskMixin

_TAG = "poprisk"
# These DPO losses sort across the batch, so no pair has a gradient of its own.
_COUPLED_LOSSES = ("aot", "aot_unpaired")


@dataclass
class PopRiskDPOConfig(PopRiskArgumentsMixin, DPOConfig):
    """``trl.DPOConfig`` with the gate's fields; one example is one preference pair."""

    def _check_examples(self) -> None:
        super()._check_examples()
        coupled = [name for name in self.loss_type if name in _COUPLED_LOSSES]
        if coupled and self.poprisk_estimator == "example":
            raise ValueError(
                f"loss_type={coupled[0]} compares the pairs of a batch with each other, so a pair has no "
                "gradient of its own: use another loss_type, such as sigmoid, or "
                "poprisk_estimator=group."
            )


@dataclass
class PopRiskSFTConfig(PopRiskArgumentsMixin, SFTConfig):
    """``trl.SFTConfig`` with the gate's fields; one example is one sequence."""

    def _check_examples(self) -> None:
        super()._check_examples()
        if self.packing and self.poprisk_estimator == "example":
            raise ValueError(
                "packing=True puts several examples into one row, which hides the single ones: set "
                "packing=False, or poprisk_estimator=group to gate on packed rows."
            )


@dataclass
class PopRiskRewardConfig(PopRiskArgumentsMixin, RewardConfig):
    """``trl.RewardConfig`` with the gate's fields; one example is one preference pair."""


class PopRiskDPOTrainer(PopRiskMixin, DPOTrainer):
    """``trl.DPOTrainer`` with the gate."""

    _config_class = PopRiskDPOConfig
    _tag_names = [*DPOTrainer._tag_names, _TAG]


class PopRiskSFTTrainer(PopRiskMixin, SFTTrainer):
    """``trl.SFTTrainer`` with the gate."""

    _config_class = PopRiskSFTConfig
    _tag_names = [*SFTTrainer._tag_names, _TAG]


class PopRiskRewardTrainer(PopRiskMixin, RewardTrainer):
    """``trl.RewardTrainer`` with the gate."""

    _config_class = PopRiskRewardConfig
    _tag_names = [*RewardTrainer._tag_names, _TAG]
