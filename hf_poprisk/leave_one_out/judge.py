"""What both judges share: a table with a row per example, estimates of the noise rate, logs and the file.

Pairs are judged before training (``before.py``), classes while the model is trained (``during.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_poprisk.leave_one_out.index import INDEX, Sample, first_difference
from hf_poprisk.leave_one_out.log_odds import LogOddsError, LogOddsTap
from hf_poprisk.leave_one_out.noise import NoiseFit
from hf_poprisk.leave_one_out.table import TABLE_NAME, ExampleTable, read_table

LABEL_NOISE_MODES = ("off", "audit", "weight")
RULE = 3  # of scores and estimates; raise it with either: a run cannot go on with others


@dataclass
class Visit:
    """Some examples in one forward and backward."""

    rows: Tensor  # [N] int64
    influence: Any = None  # of classes: ``energy``, [N], once the backward is done
    tap: LogOddsTap | None = None
    log_odds: Tensor | None = None  # [N], leave-one-out
    weight: Tensor | None = None  # [N], in [0, 1]


class LabelNoise:
    """Judges the labels of a training set, and weights its examples by what it finds.

    Args:
        mode: ``audit`` or ``weight``.
        table: its rows are kept up to date.
        sample: of the training data, by which they are known again.

    Attributes:
        fits: one ``NoiseFit`` per estimate, oldest first.
        judging_since: the optimizer step from which on weights are given; None until then.
    """

    preferences: ClassVar[bool]  # an example is a preference pair

    def __init__(self, mode: str, table: ExampleTable, sample: Sample | None = None) -> None:
        self.mode, self.table, self.sample = mode, table, sample or {}
        self.fits: list[NoiseFit] = []
        self.judging_since: int | None = None
        self.clip_coefficient: Tensor | float = 1.0
        self._num_labels = 2
        self._pending: list[Visit] = []
        self._clear_interval()

    def _clear_interval(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)  # visits, Σ weight, Σ weighted loss

    @property
    def fit(self) -> NoiseFit:
        """What labels are judged by; there is a fit."""
        return self.fits[-1]

    @property
    def weightless(self) -> bool:
        """Whether training goes on as if nothing was judged."""
        return False

    @property
    def doubt(self) -> str | None:
        """Why the estimate means little, a sentence without its end; there is a fit."""
        raise NotImplementedError

    # -- a visit ----------------------------------------------------------------------------------------

    def visit(self, rows: Tensor, influence: Any = None) -> LogOddsTap:
        """Begin the visit of N examples: enter the tap around their forward, then run their backward.

        Args:
            rows: of the table, [N] int64.
            influence: of classes; has ``energy``, [N], after the backward: by how much the step that is being
                collected lowers the accumulated loss by way of each example's own gradient.
        """
        visit = Visit(rows, influence)
        visit.tap = LogOddsTap(self.preferences, partial(self.sample_weight, visit))
        self._pending.append(visit)
        return visit.tap

    def abandon(self) -> None:
        """Forget the visit that was begun last: its backward did not run."""
        self._pending.pop()

    def sample_weight(self, visit: Visit, log_odds: Tensor, num_labels: int) -> Tensor:
        """The factor on each example's gradient, [N] in [0, 1], by its log-odds of this very visit, [N].

        Raises:
            LogOddsError: the loss is not of one label per example.
        """
        if len(log_odds) != len(visit.rows):
            raise LogOddsError(f"it has {len(log_odds)} terms for {len(visit.rows)} examples")
        self._num_labels = num_labels
        self._judge(visit, log_odds.to(self.table.device))
        if self.mode == "audit":
            return torch.ones_like(log_odds)
        return visit.weight.to(log_odds.device)  # of the head, where a model is spread over several

    def _judge(self, visit: Visit, log_odds: Tensor) -> None:
        """Set the visit's ``log_odds`` and ``weight``."""
        raise NotImplementedError

    def finish_step(self, gather: Callable[[Tensor], Tensor], open_share: Tensor | float = 1.0) -> None:
        """Book the visits of one optimizer step; every rank must call it.

        Args:
            gather: concatenates a [N, C] tensor over the ranks; N may differ.
            open_share: fraction of this step's coordinates that the gate opens.
        """
        raise NotImplementedError

    def _gathered(self, gather: Callable[[Tensor], Tensor], columns: Tensor) -> Tensor | None:
        """Rows of the table and further columns of a step, over all ranks; None if it overflowed."""
        every = gather(columns)
        if not every[:, -1].isfinite().all():
            return None
        # padding copies of an example stand on several ranks; the first one counts
        rows, order = every[:, 0].long().sort(stable=True)
        first = torch.ones_like(rows, dtype=torch.bool)
        first[1:] = rows[1:] != rows[:-1]
        kept = every[order[first]]
        return kept[kept[:, 1].isfinite()]

    def _count(self, z: Tensor, weight: Tensor) -> None:
        """Add a step's examples to the logs; [N] each."""
        sums = [weight.new_tensor(len(z)), weight.sum(), (weight * F.softplus(-z)).sum()]
        self._sums += torch.stack([x.double() for x in sums]).cpu()

    def restart_epochs(self) -> None:
        """Steps and epochs are counted from zero again."""
        self._pending.clear()  # of a step that was interrupted

    # -- what is found ----------------------------------------------------------------------------------

    def pop_logs(self) -> dict[str, float]:
        """The log entries since the last call."""
        logs: dict[str, float] = {}
        if self.fits:
            fit = self.fit
            logs |= {"noise_rate": fit.rate, "noise_rate_low": fit.low, "noise_rate_high": fit.high}
        visits, weight, loss = self._sums.tolist()
        if self.mode != "audit" and visits:
            logs["loss_weighted"] = loss / visits  # the trainer's own loss is without weights, and may rise
            if self.judging_since is not None:
                logs["weight_mean"] = weight / visits
        self._clear_interval()
        return {f"poprisk/{name}": value for name, value in logs.items()}

    def p_correct(self) -> np.ndarray:
        """Probability that each label is correct, [n] float64 in [0, 1].

        1 − ε where the example was not judged: nothing but the rate is known of it. NaN without a fit.
        """
        n = len(self.table)
        if not self.fits:
            return np.full(n, np.nan)
        log_odds = self.table.columns["log_odds"][:n].cpu().double()
        return np.where(self.table.visits[:n].cpu() > 0, self.fit.p_correct(log_odds), 1 - self.fit.rate)

    def found(self, step: int) -> str:
        """One clause on the labels; there is a fit. step: optimizer steps at the end of training."""
        fit, since = self.fit, self.judging_since
        weighted = self.mode != "audit" and since not in (None, step)
        return (
            f"poprisk_label_noise={self.mode}: estimated noise rate {fit.rate:.3f} ({fit.low:.3f} to "
            f"{fit.high:.3f})" + f", weights since step {since}" * weighted
        )

    # -- saving -----------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write ``judged.parquet``, which a resumed run goes on from."""
        self.table.save(Path(folder, TABLE_NAME), self.p_correct(), self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "preferences": self.preferences,
            "num_labels": self._num_labels,
            "judging_since": self.judging_since,
            "doubt": self.doubt if self.fits else None,
            "rule": RULE,
            "clip_coefficient": float(self.clip_coefficient),
            "interval": self._sums.tolist(),
            "fits": [asdict(fit) for fit in self.fits],
            "sample": self.sample,
        }

    def load(self, folder: str | Path) -> None:
        """Go on from where ``save`` was.

        Raises:
            ValueError: scores by another rule or of an earlier version, or of other rows than those of the
                sample.
        """
        columns, state = read_table(Path(folder))
        if state["rule"] != RULE or state["preferences"] != self.preferences:
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
        self.table = table
        self._set_state(state)

    def _set_state(self, state: dict[str, Any]) -> None:
        self._num_labels = state["num_labels"]
        self.judging_since, self.clip_coefficient = state["judging_since"], state["clip_coefficient"]
        self._sums = torch.tensor(state["interval"], dtype=torch.float64)
        self.fits = [NoiseFit(**fit) for fit in state["fits"]]
