"""What happens to an example's row at a visit, at an optimizer step, and four times per epoch.

Of a stream, whose length is not known, the last is once per pass.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_poprisk.influence import Influence
from hf_poprisk.leave_one_out.index import Sample, other_row
from hf_poprisk.leave_one_out.log_odds import LogOddsError, LogOddsTap
from hf_poprisk.leave_one_out.noise import OPEN_RATE, NoiseFit, fit_noise
from hf_poprisk.leave_one_out.table import INDEX, TABLE_NAME, ExampleTable
from hf_poprisk.leave_one_out.weights import (
    FITS_NAME,
    STILL_LEARNING,
    competent,
    doubt,
    judged_by,
    last_rise,
    load_fits,
    train_longer,
)
from hf_poprisk.record import write_json

logger = logging.getLogger(__name__)

LABEL_NOISE_MODES = ("off", "audit", "weight", "swap")
FITS_PER_EPOCH = 4
# Of what its own steps taught an example; the rest is undone by the steps of others. More stays in a
# language model, whose examples have little in common: recipes/held_out.py finds 0.68 to 0.81 for pairs, and
# 0.3 to 0.7 for classes, the less the longer they are trained.
KEPT_BY_CLASSES, KEPT_BY_PAIRS = 0.5, 0.7
# Of what can be known of the labels, see ``NoiseFit.explained``: with less than that pairs are weighted, and
# not swapped. Swaps by a model that is not sure feed on their own mistakes.
SURE_ENOUGH_TO_SWAP = 0.5
RULE = 2  # of scores (what is kept) and estimates; raise it with either: a run cannot go on with others


@dataclass
class _Visit:
    rows: Tensor  # [N] int64
    tap: LogOddsTap
    influence: Influence
    heldout: Tensor  # [N]
    weight: Tensor  # [N]


class LabelNoise:
    """Judges the labels while a model is trained on them.

    Args:
        mode: ``audit``, ``weight`` or ``swap``, which is ``weight`` while ``swaps`` is false.
        preferences: an example is a preference pair.
        table: its rows are kept up to date.
        sample: of the training data, for the audit.

    Attributes:
        fits: one ``NoiseFit`` per estimate, oldest first.
        judging_since: the optimizer step from which on weights are given; None until then. Pairs: the end
            of the first epoch, whose visits need nothing taken off. Classes, because what is not learned yet
            looks wrong, and pairs that the model had been trained on before: when the held-out
            log-likelihood has stopped rising from one epoch to the next, and is better than chance. Classes
            are judged no longer while it is not.
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
        self._pending: list[_Visit] = []
        self._clear_interval()

    def _clear_interval(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)  # visits, Σ weight, swapped, Σ weighted loss

    # -- a visit ----------------------------------------------------------------------------------------

    def visit(self, rows: Tensor, influence: Influence) -> LogOddsTap:
        """Begin the visit of N examples: enter the tap around their forward, then run their backward."""
        visit = _Visit(rows, None, influence, None, None)  # type: ignore[arg-type]
        visit.tap = LogOddsTap(self.preferences, partial(self._strength, visit))
        self._pending.append(visit)
        return visit.tap

    def abandon(self) -> None:
        """Forget the visit that was begun last: its backward did not run."""
        self._pending.pop()

    def _strength(self, visit: _Visit, log_odds: Tensor, num_labels: int) -> Tensor:
        if len(log_odds) != len(visit.rows):
            raise LogOddsError(f"it has {len(log_odds)} terms for {len(visit.rows)} examples")
        self._num_labels = num_labels
        device = log_odds.device  # of the head, where a model is spread over several
        visit.heldout = log_odds.to(self.table.device) - self.table.columns["own_effect"][visit.rows]
        visit.weight = torch.ones_like(visit.heldout)
        if self.judging_since is None or not (self.preferences or competent(self.fits[-1])):
            return visit.weight.to(device)
        # NaN, where the loss ignores the label, would spread through a gradient of zero
        visit.weight = self.fit.probability_right(visit.heldout).nan_to_num(nan=1.0)
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
        if self.mode != "swap" or not self.fits:
            return False
        first = self.fits[0]
        return first.exact and first.explained > SURE_ENOUGH_TO_SWAP and not first.open_ended

    # -- an optimizer step ------------------------------------------------------------------------------

    def finish_step(self, gather: Callable[[Tensor], Tensor], open_share: Tensor | float = 1.0) -> None:
        """Book the visits of one optimizer step; every rank must call it.

        A step with a gradient that is not finite is left out by the optimizer, and is no visit.

        Args:
            gather: concatenates a [N, 6] tensor over the ranks; N may differ.
            open_share: of the coordinates of this step, by the gate: own effects are held back by it too
                (taken as the same for every example and coordinate).
        """
        visits, self._pending = self._pending, []
        local = torch.cat([self._booked(visit, open_share) for visit in visits])
        every = gather(local)
        if not every[:, 4:].isfinite().all():
            return
        # padding copies of an example stand on several ranks; the first one counts
        rows, order = every[:, 0].long().sort(stable=True)
        first = torch.ones_like(rows, dtype=torch.bool)
        first[1:] = rows[1:] != rows[:-1]
        kept = every[order[first]]
        kept = kept[kept[:, 1].isfinite()]
        rows, (z, heldout, weight, own, agreement) = kept[:, 0].long(), kept[:, 1:].float().unbind(1)
        before = self.table.columns["own_effect"][rows]
        self.table.visit(
            rows,
            logodds=z,
            heldout_logodds=heldout,
            own_effect=before + self.kept_share * own,
            weight=weight,
            agreement_mean=agreement,
            loss_mean=F.softplus(-z),
        )
        strength = 2 * weight - 1 if self.swaps else weight
        swapped, loss = (strength < 0).sum(), strength.abs() * F.softplus(-z * strength.sign())
        sums = [weight.new_tensor(len(rows)), weight.sum(), swapped, loss.sum()]
        self._sums += torch.stack([x.double() for x in sums]).cpu()

    def _booked(self, visit: _Visit, open_share: Tensor | float) -> Tensor:
        """[N, 6] float64: row, z, ζ, weight, own effect, agreement."""
        if visit.tap.slopes is None:
            raise RuntimeError("the gradient of the examples' log-odds was not seen in the backward.")
        device = self.table.device
        # h_i = slope_i · ∂z_i/∂θ: z_i moves by 1/slope_i of what the step lowers the loss by
        energy = visit.influence.energy.to(device)
        own = (-energy / visit.tap.slopes.to(device)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        own = own * torch.as_tensor(open_share, device=device)
        columns = (
            visit.rows,
            visit.tap.log_odds,
            visit.heldout,
            visit.weight,
            torch.where(energy.isfinite(), own, torch.nan),
            visit.influence.agreement,
        )
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
        heldout = self.table.heldout()
        if not len(heldout):
            return
        self._quarters = quarters
        once = (self.table.visits == 1).sum() > (self.table.visits > 1).sum()
        fit = replace(fit_noise(heldout, self._num_labels, step, epoch), exact=bool(once) and self.untrained)
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
        if self.mode != "audit" and visits:  # the trainer's own loss is without weights, and may rise
            logs["loss_weighted"] = loss / visits
        if self.mode != "audit" and self.judging_since is not None and visits:
            logs["weight_mean"] = weight / visits
            if self.mode == "swap":
                logs["swapped"] = swapped / visits
        self._clear_interval()
        return {f"poprisk/{name}": value for name, value in logs.items()}

    def warn_at_start(self) -> None:
        """Where weights begin: say so if pairs will not be swapped."""
        if self.mode == "swap" and not self.swaps:
            known, first = max(self.fits[0].explained, 0.0), self.fits[0]
            logger.warning(
                "poprisk_label_noise=swap: pairs are weighted and none is swapped, because their first "
                f"visits were not predicted well: {known:.0%} of what can be known, where it takes "
                f"{SURE_ENOUGH_TO_SWAP:.0%}, and up to {first.high:.0%} wrong labels, where it takes no more "
                f"than {OPEN_RATE:.0%}."
            )

    def found(self, step: int) -> str:
        """One clause on the labels; there is a fit.

        Args:
            step: optimizer steps at the end of training.
        """
        fit, since = self.fit, self.judging_since
        weighted = self.mode != "audit" and since not in (None, step)
        weights = f", weights since step {since}" if weighted else ""
        return (
            f"poprisk_label_noise={self.mode}: estimated noise rate {fit.rate:.3f} ({fit.low:.3f} to "
            f"{fit.high:.3f}){weights}"
        )

    def warn_at_end(self, step: int) -> None:
        """Say what the numbers cannot be trusted for.

        Args:
            step: optimizer steps at the end of training.
        """
        name, weighs = f"poprisk_label_noise={self.mode}", self.mode != "audit"
        if not self.fits:
            logger.warning(
                f"{name}: training ended within its first epoch, so the noise rate was not estimated and no "
                f"example was weighted: {train_longer(self.preferences)}."
            )
        elif weighs and self.judging_since == step:
            logger.warning(
                f"{name}: no example was weighted, because training ended where weights would have begun: "
                "raise num_train_epochs."
            )
        elif (why := doubt(self.fits, self.preferences, self.judging_since)) is not None:
            logger.warning(f"{name}: {why}.")
        elif last_rise(self.fits) > STILL_LEARNING:
            logger.warning(
                f"{name}: held-out labels were still predicted better and better at the end: the estimated "
                "noise rate is not settled, and too low if labels are learned by heart."
            )

    # -- saving -----------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """``label_noise.parquet`` and ``label_noise.json``, which a resumed run goes on from."""
        content = {
            "mode": self.mode,
            "preferences": self.preferences,
            "num_labels": self._num_labels,
            "quarters": self._quarters,
            "judging_since": self.judging_since,
            "rule": RULE,
            "untrained": self.untrained,
            "clip_coefficient": float(self.clip_coefficient),
            "interval": self._sums.tolist(),
            "visits": int(self.table.visits.sum()),  # of the table that belongs to this
            "fits": [fit.to_dict() for fit in self.fits],
            "sample": self.sample,
        }
        write_json(Path(folder, FITS_NAME), content)
        self.table.save(Path(folder, TABLE_NAME))

    def load(self, folder: str | Path) -> None:
        """Go on from where ``save`` was.

        Raises:
            ValueError: scores by another rule, or of other rows than those of the sample.
        """
        content = json.loads(Path(folder, FITS_NAME).read_text())
        table = ExampleTable(None if self.table.streamed else self.table.ids.numpy(), self.table.device)
        table.load(Path(folder, TABLE_NAME))
        different = other_row(content.get("sample", {}), self.sample)
        if different is not None:
            raise ValueError(
                f"the training data are not those of {folder}: example {different[0]} has another "
                f"{different[1]}. Give them in the same order, or with the column {INDEX} from the start."
            )
        if content.get("rule") != RULE:
            raise ValueError(
                f"{folder} holds scores by another rule, of an earlier version, which this one cannot go on "
                "from: set poprisk_label_noise=off, or start over."
            )
        self.table, self.untrained = table, content["untrained"]
        self._num_labels, self._quarters = content["num_labels"], content["quarters"]
        self.judging_since = content["judging_since"]
        self.clip_coefficient = content["clip_coefficient"]
        interval = torch.tensor(content["interval"], dtype=torch.float64)
        if len(interval) == len(self._sums):  # not of a version that summed less
            self._sums = interval
        self.fits = load_fits(folder)
