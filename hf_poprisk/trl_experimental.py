"""Preference trainers of ``trl.experimental`` with the gate, and their configs; all without a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from hf_poprisk.arguments import PopRiskArgumentsMixin
from hf_poprisk.leave_one_out.features import pair_log_odds
from hf_poprisk.refusals import LABEL_MODE, Rule, always
from hf_poprisk.trainer import PopRiskMixin, takes_what
from hf_poprisk.trl import TAG


@dataclass
class PopRiskORPOConfig(PopRiskArgumentsMixin, ORPOConfig):
    """``ORPOConfig`` of TRL with the gate's fields; one example is one preference pair."""


@dataclass
class PopRiskCPOConfig(PopRiskArgumentsMixin, CPOConfig):
    """``CPOConfig`` of TRL, SimPO's too, with the gate's fields; one example is one preference pair."""


@dataclass
class PopRiskTPOConfig(PopRiskArgumentsMixin, TPOConfig):
    """``TPOConfig`` of TRL with the gate's fields; one example is one preference triple."""

    _label_rules = (
        Rule(
            always,
            f"{LABEL_MODE} judges pairs and classes, and a triple with a reference text is neither: set "
            "poprisk_label_noise=off, or train on its pairs with DPO or CPO.",
        ),
    )


class _PairsMixin(PopRiskMixin):
    """The collator gives a row per pair; the loss makes the chosen rows of them, then the rejected ones."""

    rows_per_example = 2
    collated_rows = 1

    def label_log_odds(self, model: nn.Module, inputs: Any) -> Tensor:  # type: ignore[override]
        """log p(chosen) − log p(rejected), [N].

        Raises:
            ValueError: a model with an encoder.
        """
        if self.is_encoder_decoder:
            raise ValueError(
                f"poprisk_label_noise={self.args.poprisk_label_noise} judges pairs of a causal language "
                "model, and this one has an encoder: set poprisk_label_noise=off."
            )
        pad, device = self.processing_class.pad_token_id, self.accelerator.device
        rows = self.concatenated_inputs(inputs, padding_value=pad, device=device)
        rows = {name.removeprefix("concatenated_"): x for name, x in rows.items()}
        mask = rows.pop("labels") != -100
        return pair_log_odds(model, {**rows, "completion_mask": mask})


class PopRiskORPOTrainer(_PairsMixin, ORPOTrainer):
    """``ORPOTrainer`` of TRL with the gate."""

    _config_class = PopRiskORPOConfig
    _tag_names = [*ORPOTrainer._tag_names, TAG]
    __init__ = takes_what(ORPOTrainer.__init__)


class PopRiskCPOTrainer(_PairsMixin, CPOTrainer):
    """``CPOTrainer`` of TRL with the gate."""

    _config_class = PopRiskCPOConfig
    _tag_names = [*CPOTrainer._tag_names, TAG]
    __init__ = takes_what(CPOTrainer.__init__)


class PopRiskTPOTrainer(PopRiskMixin, TPOTrainer):
    """``TPOTrainer`` of TRL with the gate."""

    _config_class = PopRiskTPOConfig
    _tag_names = [*TPOTrainer._tag_names, TAG]
    __init__ = takes_what(TPOTrainer.__init__)

    @property
    def rows_per_example(self) -> int:  # type: ignore[override]
        """Chosen rows, rejected ones, and those of the references, if the loss has a term for them."""
        return 3 if self.args.tpo_alpha else 2
