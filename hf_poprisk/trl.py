"""The TRL trainers with the gate, and their configs. The only module that imports trl."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils

from hf_poprisk.arguments import PopRiskArgumentsMixin
from hf_poprisk.batched import Capture, Packed
from hf_poprisk.trainer import PopRiskMixin, takes_what

_TAG = "poprisk"
# These DPO losses sort across the batch, so no pair has a gradient of its own.
_COUPLED_LOSSES = ("aot", "aot_unpaired")
# −log σ(margin), and nothing else: the margin is the log-odds of the label.
_LOG_ODDS_LOSSES = ("sigmoid", "sigmoid_norm")
# These have no log σ of anything, so the margin in the other loss of a list stays the only one.
_LOSSES_WITHOUT_LOG_ODDS = ("sft", "hinge", "ipo", "sppo_hard", "apo_zero", "apo_down")
_OR_AUDIT = ", or set poprisk_label_noise=audit"


@dataclass
class PopRiskDPOConfig(PopRiskArgumentsMixin, DPOConfig):
    """``trl.DPOConfig`` with the gate's fields; one example is one preference pair."""

    _swappable = True

    def _check_examples(self) -> None:
        super()._check_examples()
        coupled = [name for name in self.loss_type if name in _COUPLED_LOSSES]
        if coupled and self.poprisk_estimator == "example":
            raise ValueError(
                f"loss_type={coupled[0]} compares the pairs of a batch with each other, so a pair has no "
                "gradient of its own: use another loss_type, such as sigmoid, or "
                "poprisk_estimator=group."
            )
        _check_padding_free(self)

    def _check_label_noise(self) -> None:
        super()._check_label_noise()
        mode = f"poprisk_label_noise={self.poprisk_label_noise}"
        # An audit reads the margins and lets the loss be. With further terms in it, self-influence is that
        # of the whole loss, not of the margin alone; the first visits, which have none, are exact.
        audit, losses = self.poprisk_label_noise == "audit", ",".join(self.loss_type)
        judged = [name for name in self.loss_type if name in _LOG_ODDS_LOSSES]
        others = [name for name in self.loss_type if name not in _LOG_ODDS_LOSSES]
        readable = len(judged) == 1 and all(name in _LOSSES_WITHOUT_LOG_ODDS for name in others)
        if not readable or others and not audit:
            raise ValueError(
                f"{mode} needs a loss whose margin is the log-odds of the label, and loss_type={losses} is "
                f"not one: use {' or '.join(_LOG_ODDS_LOSSES)}{_OR_AUDIT if readable else ''}."
            )
        if self.use_weighting and not audit:
            raise ValueError(f"{mode} weighs the pairs itself: set use_weighting=False{_OR_AUDIT}.")
        if self.sync_ref_model:
            raise ValueError(f"{mode} compares margins to one reference model: set sync_ref_model=False.")
        if self.f_divergence_type == "js_divergence":
            raise ValueError(f"{mode} cannot read f_divergence_type=js_divergence: use reverse_kl.")


@dataclass
class PopRiskSFTConfig(PopRiskArgumentsMixin, SFTConfig):
    """``trl.SFTConfig`` with the gate's fields; one example is one sequence."""

    def _check_examples(self) -> None:
        super()._check_examples()
        if self.packing and self.packing_strategy != "bfd" and self.poprisk_estimator == "example":
            raise ValueError(
                f"packing_strategy={self.packing_strategy} cuts sequences, and the parts of one are no "
                "examples of their own: set packing_strategy=bfd, or poprisk_estimator=group to gate on "
                "packed rows."
            )

    def _check_label_noise(self) -> None:
        raise ValueError(
            f"poprisk_label_noise={self.poprisk_label_noise} judges labels, and a sequence has none: set "
            "poprisk_label_noise=off, or train with DPO, a reward model or a classifier."
        )


@dataclass
class PopRiskRewardConfig(PopRiskArgumentsMixin, RewardConfig):
    """``trl.RewardConfig`` with the gate's fields; one example is one preference pair."""

    _swappable = True

    def _check_label_noise(self) -> None:
        super()._check_label_noise()
        # In an audit self-influence is that of the whole loss, as with DPO's further terms.
        if self.center_rewards_coefficient is not None and self.poprisk_label_noise != "audit":
            raise ValueError(
                f"poprisk_label_noise={self.poprisk_label_noise} needs a loss that is a function of the "
                f"reward margins alone: remove center_rewards_coefficient{_OR_AUDIT}."
            )


def _check_padding_free(args: Any) -> None:
    if args.padding_free and args.poprisk_estimator == "example" and args.per_device_train_batch_size > 1:
        raise ValueError(
            "padding_free=True joins the examples of a micro-batch into one row, which hides the single "
            "ones: set padding_free=False or per_device_train_batch_size=1."
        )


class _FusedHeadMixin(PopRiskMixin):
    """Runs TRL's fused language-model head example by example, so that its weight can be gated.

    The head multiplies all tokens of a micro-batch at once, and none of its rows says whose it is.
    """

    @contextmanager
    def _row_operations(self, capture: Capture) -> Iterator[None]:
        stock, seen = trl_utils._ChunkedLogProbFunction, {}

        def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            seen.update({name: kwargs.get(name) for name in ("labels", "shift_labels")})

        def apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any) -> Any:
            if not (capture.wants(weight) or capture.wants(bias)):
                return stock.apply(hidden, weight, bias, labels, *rest)
            layout = capture.layout
            shifted = seen["labels"][:, 1:] if seen["shift_labels"] is None else seen["shift_labels"]
            compact = trl_utils._use_triton(hidden.device)  # only the labelled tokens are there
            if isinstance(layout, Packed):  # the last sequence has no token after it
                parts = shifted[0].split(
                    [*layout.lengths[:-1], layout.lengths[-1] - layout.num_tokens + shifted.shape[1]]
                )
                lengths = [int((part != -100).sum()) if compact else len(part) for part in parts]
            elif compact:
                lengths = (shifted != -100).sum(1).tolist()
            else:
                lengths = [len(hidden) // layout.num_rows] * layout.num_rows
            rows = list(zip(hidden.split(lengths), labels.split(lengths), strict=True))
            outputs: list[Any] = [None] * len(rows)
            for i in range(layout.num_examples):
                mine = [capture.for_example(p, i) if capture.wants(p) else p for p in (weight, bias)]
                for row in range(i, len(rows), layout.num_examples):
                    row_hidden, row_labels = rows[row]
                    outputs[row] = stock.apply(row_hidden, *mine, row_labels, *rest)
            columns = zip(*outputs, strict=True)
            return tuple(None if column[0] is None else torch.cat(column) for column in columns)

        hook = self.accelerator.unwrap_model(self.model).register_forward_pre_hook(see, with_kwargs=True)
        trl_utils._ChunkedLogProbFunction = SimpleNamespace(apply=apply)
        try:
            yield
        finally:
            trl_utils._ChunkedLogProbFunction = stock
            hook.remove()


class PopRiskDPOTrainer(_FusedHeadMixin, DPOTrainer):
    """``trl.DPOTrainer`` with the gate."""

    _rows_per_example = 2  # chosen rows first, then rejected ones
    _preferences = True
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

    _rows_per_example = 2  # chosen rows first, then rejected ones
    _preferences = True
    _config_class = PopRiskRewardConfig
    _tag_names = [*RewardTrainer._tag_names, _TAG]

    @takes_what(RewardTrainer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def _check_judged(self, data: Any) -> None:
        super()._check_judged(data)
        if "margin" in (getattr(data, "column_names", None) or next(iter(data), {})):
            raise ValueError(
                "poprisk_label_noise judges pairs by the difference of their rewards, from which the column "
                "margin would be taken: remove the column, or set poprisk_label_noise=off."
            )
