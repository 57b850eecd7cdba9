"""Classes are judged during training: what happens at a visit, at a step, and four times per epoch.

Every visit of an example yields the log-odds of its label, z. Part of z the example has taught the model
itself; what is left is leave-one-out, ``ζ_i = z_i − C_i``, with C_i a part κ of its self-influence so far
(the steps of the others undo the rest):

    s_i = q̄ · lr/B · ω_i (1 − p_i) · Σ_k (∂z_i/∂θ_k)² / (√v̂_k + ε)          C_i ← C_i + κ s_i

ω_i is the weight it was given, B the examples per step, q̄ the fraction of coordinates that the gate opens;
each term of the sum is bounded by what one step of Adam can be, and of large matrices a part stands for the
whole, see ``SelfInfluence``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_poprisk.leave_one_out.judge import LabelNoise, Visit
from hf_poprisk.leave_one_out.noise import fit_noise
from hf_poprisk.leave_one_out.table import ExampleTable
from hf_poprisk.leave_one_out.weights import (
    STILL_LEARNING,
    TRAIN_LONGER,
    caveat,
    competent,
    doubt,
    last_rise,
)

logger = logging.getLogger(__name__)

FITS_PER_EPOCH = 4
KEPT = 0.5  # κ; self-influence that is left at the next visit, measured, is 0.3 to 0.7


class ClassNoise(LabelNoise):
    """Judges the labels of classes while a model is trained on them.

    Weights are given (``judging_since``) once the log-likelihood of the labels has stopped rising from one
    epoch to the next, and is better than chance: what is not learned yet looks mislabeled.
    """

    preferences = False

    def __init__(self, mode: str, table: ExampleTable, sample: Any = None) -> None:
        super().__init__(mode, table, sample)
        self._quarters = 0  # of an epoch, at the last fit

    def _judge(self, visit: Visit, log_odds: Tensor) -> None:
        visit.log_odds = log_odds - self.table.columns["self_influence"][visit.rows]
        visit.weight = torch.ones_like(visit.log_odds)
        if self.judging_since is not None and competent(self.fits[-1]):
            # NaN, where the loss ignores the label, would spread through a gradient of zero
            visit.weight = self.fit.p_correct(visit.log_odds).nan_to_num(nan=1.0)

    def finish_step(self, gather: Callable[[Tensor], Tensor], open_share: Tensor | float = 1.0) -> None:
        """As in the base class; the gate holds self-influence back too, by its mean over the coordinates.

        A step with a gradient that is not finite is left out by the optimizer, and is no visit.
        """
        visits, self._pending = self._pending, []
        kept = self._gathered(gather, torch.cat([self.booked(visit, open_share) for visit in visits]))
        if kept is None:
            return
        rows, (z, log_odds, weight, own) = kept[:, 0].long(), kept[:, 1:].float().unbind(1)
        self.table.visit(
            rows,
            log_odds=log_odds,
            self_influence=self.table.columns["self_influence"][rows] + KEPT * own,
            weight=weight,
            loss_mean=F.softplus(-z),
        )
        self._count(z, weight)

    def booked(self, visit: Visit, open_share: Tensor | float) -> Tensor:
        """[N, 5] float64: row, z, ζ, weight, self-influence of this step."""
        if visit.tap.slopes is None:
            raise RuntimeError("the gradient of the examples' log-odds was not seen in the backward.")
        device = self.table.device
        # h_i = slope_i · ∂z_i/∂θ: z_i moves by 1/slope_i of what the step lowers the loss by
        energy = visit.influence.energy.to(device)
        own = (-energy / visit.tap.slopes.to(device)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        own = own * torch.as_tensor(open_share, device=device)
        own = torch.where(energy.isfinite(), own, torch.nan)
        columns = (visit.rows, visit.tap.log_odds, visit.log_odds, visit.weight, own)
        return torch.stack([x.to(device, torch.float64) for x in columns], 1)

    def maybe_fit(self, epoch: float, step: int) -> None:
        """Estimate the noise rate if a quarter of an epoch has passed since the last time.

        Args:
            epoch: passes over the data so far; nothing is estimated before the first one is complete.
            step: optimizer steps so far.
        """
        quarters = math.floor(FITS_PER_EPOCH * epoch + 1e-6)
        if quarters < FITS_PER_EPOCH or quarters <= self._quarters or not len(self.table):
            return
        log_odds = self.table.log_odds()
        if not len(log_odds):
            return
        self._quarters = quarters
        self.fits.append(fit_noise(log_odds, self._num_labels, step, epoch))
        later = epoch >= self.fits[0].epoch + 1 - 1e-6
        if (
            self.judging_since is None
            and later
            and competent(self.fit)
            and last_rise(self.fits) < STILL_LEARNING
        ):
            self.judging_since = step

    def restart_epochs(self) -> None:
        """As in the base class: the scores stay, the estimates begin anew."""
        super().restart_epochs()
        self.fits, self.judging_since, self._quarters = [], None, 0

    @property
    def doubt(self) -> str | None:
        return doubt(self.fits, self.judging_since)

    def warn_at_end(self, step: int) -> None:
        """Say what the numbers cannot be trusted for; step: optimizer steps at the end of training."""
        if not self.fits:
            why = "training ended within its first epoch, so the noise rate was not estimated and no example "
            why += f"was weighted: {TRAIN_LONGER}"
        elif self.mode != "audit" and self.judging_since == step:
            why = "no example was weighted, because training ended where weights would have begun: raise "
            why += "num_train_epochs"
        else:
            why = self.doubt or caveat(self.fits)
        if why:
            logger.warning(f"poprisk_label_noise={self.mode}: {why}.")

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "quarters": self._quarters}

    def _set_state(self, state: dict[str, Any]) -> None:
        super()._set_state(state)
        self._quarters = state["quarters"]
