"""The rule during training: what happens to an example's row at a visit, at a step, four times per epoch.

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
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_poprisk.leave_one_out.index import INDEX, Sample, first_difference
from hf_poprisk.leave_one_out.log_odds import LogOddsError, LogOddsTap
from hf_poprisk.leave_one_out.noise import NoiseFit, fit_noise
from hf_poprisk.leave_one_out.table import TABLE_NAME, ExampleTable, read_table
from hf_poprisk.leave_one_out.weights import (
    STILL_LEARNING,
    SURE_ENOUGH_TO_SWAP,
    caveat,
    competent,
    doubt,
    judged_by,
    last_rise,
    sure_enough_to_swap,
    train_longer,
)

logger = logging.getLogger(__name__)

LABEL_NOISE_MODES = ("off", "audit", "weight", "swap")
FITS_PER_EPOCH = 4
# κ. More stays in a language model, whose examples have little in common: recipes/held_out.py finds 0.68 to
# 0.81 for pairs, and 0.3 to 0.7 for classes, the less the longer they are trained.
KEPT_BY_CLASSES, KEPT_BY_PAIRS = 0.5, 0.7
RULE = 2  # of scores (what is kept) and estimates; raise it with either: a run cannot go on with others


@dataclass
class Visit:
    """Some examples in one forward and backward."""

    rows: Tensor  # [N] int64
    influence: Any  # ``energy``, [N], once the backward is done
    tap: LogOddsTap | None = None
    log_odds: Tensor | None = None  # [N], leave-one-out
    weight: Tensor | None = None  # [N]


class LabelNoise:
    """Judges the labels while a model is trained on them.

    Args:
        mode: ``audit``, ``weight`` or ``swap``, which is ``weight`` while ``swaps`` is false.
        preferences: an example is a preference pair.
        table: its rows are kept up to date.
        sample: of the training data, by which they are known again.

    Attributes:
        fits: one ``NoiseFit`` per estimate, oldest first.
        judging_since: the optimizer step from which on weights are given; None until then. Pairs: the end
            of the first epoch, whose visits need nothing taken off. Classes, because what is not learned yet
            looks mislabeled, and pairs that the model had been trained on before: when the log-likelihood
            has stopped rising from one epoch to the next, and is better than chance. Classes are judged no
            longer while it is not.
    """

    def __init__(
        self, mode: str, preferences: bool, table: ExampleTable, sample: Sample | None = None
    ) -> None:
        self.mode, self.preferences, self.table, self.sample = mode, preferences, table, sample or {}
        self.kept_share = KEPT_BY_PAIRS if preferences else KEPT_BY_CLASSES
        self.fits: list[NoiseFit] = []
        self.untrained = True  # the model, on these examples, before the first visit
        self.judging_since: int | None = None
        self.clip_coefficient: Tensor | float = 1.0
        self._num_labels = 2
        self._quarters = 0  # of an epoch, at the last fit
        self._pending: list[Visit] = []
        self._clear_interval()

    def _clear_interval(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)  # visits, Σ weight, swapped, Σ weighted loss

    # -- a visit ----------------------------------------------------------------------------------------

    def visit(self, rows: Tensor, influence: Any) -> LogOddsTap:
        """Begin the visit of N examples: enter the tap around their forward, then run their backward.

        Args:
            rows: of the table, [N] int64.
            influence: has ``energy``, [N], after the backward: by how much the step that is being collected
                lowers the accumulated loss by way of each example's own gradient.
        """
        visit = Visit(rows, influence)
        visit.tap = LogOddsTap(self.preferences, partial(self.sample_weight, visit))
        self._pending.append(visit)
        return visit.tap

    def abandon(self) -> None:
        """Forget the visit that was begun last: its backward did not run."""
        self._pending.pop()

    def sample_weight(self, visit: Visit, log_odds: Tensor, num_labels: int) -> Tensor:
        """The factor on each example's gradient, [N] in [−1, 1], by its log-odds of this very visit, [N].

        Raises:
            LogOddsError: the loss is not of one label per example.
        """
        if len(log_odds) != len(visit.rows):
            raise LogOddsError(f"it has {len(log_odds)} terms for {len(visit.rows)} examples")
        self._num_labels = num_labels
        device = log_odds.device  # of the head, where a model is spread over several
        visit.log_odds = log_odds.to(self.table.device) - self.table.columns["self_influence"][visit.rows]
        visit.weight = torch.ones_like(visit.log_odds)
        if self.judging_since is None or not (self.preferences or competent(self.fits[-1])):
            return visit.weight.to(device)
        # NaN, where the loss ignores the label, would spread through a gradient of zero
        visit.weight = self.fit.p_correct(visit.log_odds).nan_to_num(nan=1.0)
        if self.mode == "audit":
            return torch.ones_like(log_odds)
        return (2 * visit.weight - 1 if self.swaps else visit.weight).to(device)

    @property
    def fit(self) -> NoiseFit:
        """What labels are judged by; there is a fit."""
        return judged_by(self.fits, self.preferences)

    @property
    def swaps(self) -> bool:
        """Whether pairs are trained by 2w − 1: in ``swap``, if the first visits were predicted well."""
        return self.mode == "swap" and bool(self.fits) and sure_enough_to_swap(self.fits[0])

    # -- an optimizer step ------------------------------------------------------------------------------

    def finish_step(self, gather: Callable[[Tensor], Tensor], open_share: Tensor | float = 1.0) -> None:
        """Book the visits of one optimizer step; every rank must call it.

        A step with a gradient that is not finite is left out by the optimizer, and is no visit.

        Args:
            gather: concatenates a [N, 5] tensor over the ranks; N may differ.
            open_share: fraction of this step's coordinates that the gate opens: it holds self-influence back
                too (taken as the same for every example and coordinate).
        """
        visits, self._pending = self._pending, []
        every = gather(torch.cat([self.booked(visit, open_share) for visit in visits]))
        if not every[:, 4].isfinite().all():
            return
        # padding copies of an example stand on several ranks; the first one counts
        rows, order = every[:, 0].long().sort(stable=True)
        first = torch.ones_like(rows, dtype=torch.bool)
        first[1:] = rows[1:] != rows[:-1]
        kept = every[order[first]]
        kept = kept[kept[:, 1].isfinite()]
        rows, (z, log_odds, weight, own) = kept[:, 0].long(), kept[:, 1:].float().unbind(1)
        before = self.table.columns["self_influence"][rows]
        self.table.visit(
            rows,
            log_odds=log_odds,
            self_influence=before + self.kept_share * own,
            weight=weight,
            loss_mean=F.softplus(-z),
        )
        factor = 2 * weight - 1 if self.swaps else weight
        swapped, loss = (factor < 0).sum(), factor.abs() * F.softplus(-z * factor.sign())
        sums = [weight.new_tensor(len(rows)), weight.sum(), swapped, loss.sum()]
        self._sums += torch.stack([x.double() for x in sums]).cpu()

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

    # -- the noise rate ---------------------------------------------------------------------------------

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
        once = (self.table.visits == 1).sum() > (self.table.visits > 1).sum()
        fit = fit_noise(log_odds, self._num_labels, step, epoch)
        fit = replace(fit, exact=bool(once) and self.untrained)
        self.fits.append(fit)
        later = epoch >= self.fits[0].epoch + 1 - 1e-6
        learned = later and competent(fit) and last_rise(self.fits) < STILL_LEARNING
        if self.judging_since is None and ((self.preferences and fit.exact) or learned):
            self.judging_since = step

    def restart_epochs(self) -> None:
        """Steps and epochs are counted from zero again: the scores stay, the estimates begin anew."""
        self.fits, self.judging_since, self._quarters = [], None, 0
        self._pending.clear()  # of a step that was interrupted

    def pop_logs(self) -> dict[str, float]:
        """The log entries since the last call."""
        logs: dict[str, float] = {}
        if self.fits:
            fit = self.fit
            logs |= {"noise_rate": fit.rate, "noise_rate_low": fit.low, "noise_rate_high": fit.high}
        visits, weight, swapped, loss = self._sums.tolist()
        if self.mode != "audit" and visits:
            logs["loss_weighted"] = loss / visits  # the trainer's own loss is without weights, and may rise
            if self.judging_since is not None:
                logs["weight_mean"] = weight / visits
                logs |= {"swapped": swapped / visits} if self.mode == "swap" else {}
        self._clear_interval()
        return {f"poprisk/{name}": value for name, value in logs.items()}

    def p_correct(self) -> np.ndarray:
        """Probability that each label is correct, [n] float64 in [0, 1].

        1 − ε where the example was never visited: nothing but the rate is known of it. NaN without a fit.
        """
        n = len(self.table)
        if not self.fits:
            return np.full(n, np.nan)
        log_odds = self.table.columns["log_odds"][:n].cpu().double()
        return np.where(self.table.visits[:n].cpu() > 0, self.fit.p_correct(log_odds), 1 - self.fit.rate)

    # -- what is said -----------------------------------------------------------------------------------

    def warn_at_start(self) -> None:
        """Where weights begin: say so if pairs will not be swapped."""
        if self.mode == "swap" and not self.swaps:
            known, high = max(self.fits[0].explained, 0.0), self.fits[0].high
            logger.warning(
                "poprisk_label_noise=swap: pairs are weighted and none is swapped, because their first "
                f"visits were not predicted well ({known:.0%} of what can be known, where it takes "
                f"{SURE_ENOUGH_TO_SWAP:.0%}) or leave the noise rate open (up to {high:.0%})."
            )

    def found(self, step: int) -> str:
        """One clause on the labels; there is a fit. step: optimizer steps at the end of training."""
        fit, since = self.fit, self.judging_since
        weighted = self.mode != "audit" and since not in (None, step)
        return (
            f"poprisk_label_noise={self.mode}: estimated noise rate {fit.rate:.3f} ({fit.low:.3f} to "
            f"{fit.high:.3f})" + f", weights since step {since}" * weighted
        )

    def warn_at_end(self, step: int) -> None:
        """Say what the numbers cannot be trusted for; step: optimizer steps at the end of training."""
        if not self.fits:
            why = "training ended within its first epoch, so the noise rate was not estimated and no example "
            why += f"was weighted: {train_longer(self.preferences)}"
        elif self.mode != "audit" and self.judging_since == step:
            why = "no example was weighted, because training ended where weights would have begun: raise "
            why += "num_train_epochs"
        else:
            why = doubt(self.fits, self.preferences, self.judging_since) or caveat(self.fits)
        if why:
            logger.warning(f"poprisk_label_noise={self.mode}: {why}.")

    # -- saving -----------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write ``judged.parquet``, which a resumed run goes on from."""
        state = {
            "mode": self.mode,
            "preferences": self.preferences,
            "num_labels": self._num_labels,
            "quarters": self._quarters,
            "judging_since": self.judging_since,
            "rule": RULE,
            "untrained": self.untrained,
            "clip_coefficient": float(self.clip_coefficient),
            "interval": self._sums.tolist(),
            "fits": [asdict(fit) for fit in self.fits],
            "sample": self.sample,
        }
        self.table.save(Path(folder, TABLE_NAME), self.p_correct(), state)

    def load(self, folder: str | Path) -> None:
        """Go on from where ``save`` was.

        Raises:
            ValueError: scores by another rule or of an earlier version, or of other rows than those of the
                sample.
        """
        columns, state = read_table(Path(folder))
        if state["rule"] != RULE:
            raise ValueError(
                f"{folder} holds scores by another rule, of an earlier version, which this one cannot go on "
                "from: set poprisk_label_noise=off, or start over."
            )
        table = ExampleTable(None if self.table.streamed else self.table.ids.numpy(), self.table.device)
        table.load(columns)
        different = first_difference(state["sample"], self.sample)
        if different is not None:
            raise ValueError(
                f"the training data are not those of {folder}: example {different[0]} has another "
                f"{different[1]}. Give them in the same order, or with the column {INDEX} from the start."
            )
        self.table, self.untrained = table, state["untrained"]
        self._num_labels, self._quarters = state["num_labels"], state["quarters"]
        self.judging_since, self.clip_coefficient = state["judging_since"], state["clip_coefficient"]
        self._sums = torch.tensor(state["interval"], dtype=torch.float64)
        self.fits = [NoiseFit(**fit) for fit in state["fits"]]
